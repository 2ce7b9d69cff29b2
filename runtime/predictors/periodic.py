"""`periodic`: every p prompts, what the next p prompts will use, from what past prompts used.

eMoE (arXiv 2503.06823). How often each expert will be chosen, f, is predicted once per period and kept; what is
forecast are the expected tokens of the requests that run,

    N_i = sum over tasks of (sum_j W_j + T W_o) s f_i

with W_j the input tokens of request j, T running requests of the task, W_o the output tokens expected of each, and
s = 0 for layers whose routing does not matter to the task, else 1. The paper loads experts only when it predicts, and
a token whose expert is not there takes another one; here routing stays exact, and N_i says what to keep and prefetch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.errors import ArtifactError, UsageError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.base import Forecast, Observation, Predictor
from runtime.predictors.expert_frequencies import HISTORY, Frequencies, PastPrompt, PromptModel, decayed_frequencies
from runtime.predictors.params import PeriodicParams
from runtime.vocabulary import Pass

KIND = "periodic"
SENSITIVITY = "sensitivity"
"""Key of an artefact's params: by task, what `harness.fitting.sensitivity` measured."""

# After which a request counts as ended. One that its scheduler leaves out for longer (`route_overlap` may, with a long
# quantum) goes on as another when it comes back.
_ABSENT_PASSES = 8


class TaskLoad(NamedTuple):
    """The running requests of one task."""

    input_tokens: int
    """Of all of them, sum_j W_j."""
    num_requests: int
    """T."""
    output_tokens: float
    """Expected of each, W_o."""

    @property
    def tokens(self) -> float:
        """sum_j W_j + T W_o."""
        return self.input_tokens + self.num_requests * self.output_tokens


def expected_tokens(
    loads: Mapping[str, TaskLoad], frequencies: Frequencies, insensitive: Mapping[str, Sequence[int]]
) -> Forecast:
    """N_i, float32 [layers, experts].

    Args:
        insensitive: by task, the layers with s = 0.
    """
    total = np.zeros_like(frequencies[None])
    for task, load in loads.items():
        tokens = load.tokens * frequencies.get(task, frequencies[None])
        tokens[list(insensitive.get(task, ()))] = 0.0
        total += tokens
    return total


@dataclass
class _Prompt:
    """A request as far as it has got; `counts` are of the `num_counted` tokens before the pass at hand."""

    task: str
    counts: Forecast
    num_counted: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    last_step: int = 0


class Periodic(Predictor):
    """See the module. Passes that do not say whose their tokens are count as one prompt that never ends.

    The forecast is N_i in proportion to the tokens of the pass at hand: the same order, in tokens of one pass. There is
    none until there are past prompts (with steps as the unit: a past step).

    Args:
        artifact: the trained model and which layers matter to which task; None: frequencies, and all do.
        every, every_unit: a prediction is kept for that many prompts ("prompt") or passes ("step").

    Raises:
        UsageError: the sequence model is asked for and there is no artefact.
        ArtifactError: the artefact is damaged.
    """

    sees_next_pass = True

    def __init__(
        self, shape: RoutingShape, params: PeriodicParams, artifact: Artifact | None, *, every: int, every_unit: str
    ) -> None:
        self._shape, self._every, self._by_prompt = shape, every, every_unit == "prompt"
        self._model = _model(shape, params, artifact)
        self._insensitive = insensitive_layers(artifact) if artifact is not None and params.skip_insensitive else {}
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()
        self._frequencies: Frequencies | None = None
        self._age = 0  # prompts or passes that the frequencies have served
        self._forecast: Forecast | None = None
        self._in_pass: list[_Prompt] = []
        self._rows: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # which of these each token of the pass belongs to
        self._seen = np.zeros((0, shape.layers, shape.experts + 1), np.float32)  # the last column: no expert

    def begin(self, passing: Pass) -> None:
        """Take note of who runs; predict where a period has ended."""
        self._remember()
        num_new = self._enter(passing)
        self._predict(num_new if self._by_prompt else 1)
        self._forget(passing.step)
        self._forecast = self._of_pass(passing)

    def observe(self, layer: int, observation: Observation) -> None:
        """Count the choices for the prompts that they belong to."""
        if len(observation.experts) != len(self._rows):
            return  # an encoder beside a decoder: whose these tokens are is not known
        num_prompts, width = len(self._in_pass), self._seen.shape[2]
        chosen = np.minimum(observation.experts, width - 1) + self._rows[:, None] * width
        counts = np.bincount(chosen.reshape(-1), minlength=num_prompts * width)
        self._seen[:, layer] = counts.reshape(num_prompts, width)

    def forecast(self, layer: int) -> Forecast | None:
        """The same at every layer of a pass."""
        return self._forecast

    def _remember(self) -> None:
        """The pass before is complete."""
        sizes = np.bincount(self._rows).tolist()
        for prompt, counts, size in zip(self._in_pass, self._seen, sizes, strict=True):
            if counts.any():  # nothing is observed while nobody asks
                prompt.counts += counts[:, :-1]
                prompt.num_counted += size

    def _enter(self, passing: Pass) -> int:
        """Count the tokens of the pass for their prompts; how many of these are new."""
        numbers, first, rows, counts = np.unique(
            passing.requests or (-1,) * passing.num_tokens, return_index=True, return_inverse=True, return_counts=True
        )
        num_new, self._in_pass = 0, []
        for number, place, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True):
            prompt = self._prompts.get(number)
            if prompt is None:
                task = passing.tasks[place] if passing.tasks else "default"
                prompt = self._prompts[number] = _Prompt(task, np.zeros(self._shape[:2], np.float32))
                num_new += 1
            if count == 1 and prompt.input_tokens:
                prompt.output_tokens += 1
            else:
                prompt.input_tokens += count
            prompt.last_step = passing.step
            self._in_pass.append(prompt)
        self._rows = rows.reshape(-1)
        self._seen = np.zeros((len(numbers), *self._seen.shape[1:]), np.float32)
        return num_new

    def _predict(self, units: int) -> None:
        self._age += units
        if not units or (self._frequencies is not None and self._age < self._every):
            return
        past = [PastPrompt(p.task, p.counts, p.num_counted) for p in self._prompts.values() if p.num_counted]
        if past:
            self._frequencies = self._model(past, self._every if self._by_prompt else 1)
            self._age = 0

    def _forget(self, step: int) -> None:
        ended = [number for number, prompt in self._prompts.items() if not _runs(prompt, step)]
        for number in ended[: max(0, len(ended) - HISTORY)]:
            del self._prompts[number]

    def _of_pass(self, passing: Pass) -> Forecast | None:
        if self._frequencies is None:
            return None
        loads = _loads(self._prompts.values(), passing.step)
        per_token = passing.num_tokens / sum(load.tokens for load in loads.values())
        return expected_tokens(loads, self._frequencies, self._insensitive) * np.float32(per_token)


def _runs(prompt: _Prompt, step: int) -> bool:
    return prompt.last_step > step - _ABSENT_PASSES


def _loads(prompts: Iterable[_Prompt], step: int) -> dict[str, TaskLoad]:
    """Of the tasks that run. W_o is the mean of the task's past requests, else of all; 0 before any has ended."""
    running: dict[str, list[int]] = {}
    ended: dict[str | None, list[int]] = {}
    for prompt in prompts:
        if _runs(prompt, step):
            running.setdefault(prompt.task, []).append(prompt.input_tokens)
        else:
            for task in (prompt.task, None):
                ended.setdefault(task, []).append(prompt.output_tokens)
    lengths = {task: sum(outputs) / len(outputs) for task, outputs in ended.items()}
    return {
        task: TaskLoad(sum(inputs), len(inputs), lengths.get(task, lengths.get(None, 0.0)))
        for task, inputs in running.items()
    }


def _model(shape: RoutingShape, params: PeriodicParams, artifact: Artifact | None) -> PromptModel:
    if artifact is None and params.model == "sequence":
        raise UsageError(
            f"predictor {KIND!r} with model 'sequence' needs an artefact; train one: python -m harness.fit {KIND}, "
            "or take params: {model: frequency}"
        )
    if artifact is None or params.model == "frequency":
        return lambda past, period: decayed_frequencies(past, shape)
    from runtime.predictors.expert_sequence import ExpertSequence

    return ExpertSequence.of(artifact).predict


def insensitive_layers(artifact: Artifact) -> dict[str, list[int]]:
    """By task, the layers whose routing does not matter to it.

    Raises:
        ArtifactError: what the artefact says of it is damaged.
    """
    try:
        measured = artifact.params.get(SENSITIVITY, {})
        found = {str(task): [int(layer) for layer in of["insensitive_layers"]] for task, of in measured.items()}
        if all(0 <= layer < artifact.shape.layers for layers in found.values() for layer in layers):
            return found
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # the last one: int(inf)
        pass
    raise ArtifactError(
        f"the {KIND} predictor of {artifact.model} is damaged ({SENSITIVITY}); fit it again: python -m harness.fit"
    )
