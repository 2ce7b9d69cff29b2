"""The sequence model of `periodic`: a recurrent network over what past prompts used.

eMoE-A (arXiv 2503.06823): (e_1 .. e_m)^{r2} = f((e_1 .. e_m)^{r1}), all layers of coming prompts from the
distributions of past ones. The paper takes a pretrained XLNet of 0.108 B parameters over expert indices. Nothing of its
text pretraining is about experts, and hundreds of prompts are what there is to train on, so this is a small GRU that
reads the distributions themselves and corrects the frequency model: untrained, it *is* the frequency model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from runtime.errors import ArtifactError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.base import Forecast
from runtime.predictors.expert_frequencies import PastPrompt, decayed_frequencies
from runtime.predictors.periodic import KIND
from runtime.predictors.weights import check_weights, sizes_of

LONGEST_PERIOD = 64
"""Prompts; what is predicted further ahead is taken to be the same."""


@dataclass(frozen=True)
class Sizes:
    """Of the network. `window`: past prompts that it reads at most."""

    hidden: int
    window: int


class Question(NamedTuple):
    """What the network is asked: what `task` will use in the `period` prompts after `past`."""

    past: Sequence[PastPrompt]
    task: str | None
    period: int
    base: Forecast
    """What the frequency model says to that, [layers, experts]."""


class ExpertSequence(nn.Module):
    """See the module.

    Args:
        tasks: those that have an embedding; all others share one.
    """

    def __init__(self, sizes: Sizes, shape: RoutingShape, tasks: Sequence[str]) -> None:
        super().__init__()
        self.sizes, self.shape, self.tasks = sizes, shape, tuple(tasks)
        num_cells = shape.layers * shape.experts
        self.task = nn.Embedding(len(tasks) + 1, sizes.hidden)
        self.read = nn.Linear(num_cells, sizes.hidden)
        self.recurrent = nn.GRU(sizes.hidden, sizes.hidden, batch_first=True)
        self.ask = nn.Linear(2 * sizes.hidden + 1, sizes.hidden)
        self.answer = nn.Linear(sizes.hidden, num_cells)
        nn.init.zeros_(self.answer.weight)
        nn.init.zeros_(self.answer.bias)

    def forward(self, questions: Sequence[Question]) -> torch.Tensor:
        """Logits of the shares of tokens that choose each expert, [questions, layers, experts]."""
        base = torch.from_numpy(np.stack([question.base for question in questions]))
        pasts = {id(question.past): question.past for question in questions}
        states = dict(zip(pasts, self._states(list(pasts.values())), strict=True))
        state = torch.stack([states[id(question.past)] for question in questions])
        task = self.task(torch.tensor([self._row(question.task) for question in questions]))
        period = torch.tensor([[min(question.period, LONGEST_PERIOD) / LONGEST_PERIOD] for question in questions])
        asked = torch.tanh(self.ask(torch.cat([state, task, period], dim=1)))
        correction: torch.Tensor = self.answer(asked).reshape(-1, *self.shape[:2])
        return torch.logit(base, eps=_LEAST_SHARE) + correction

    @torch.inference_mode()
    def predict(self, past: Sequence[PastPrompt], period: int) -> dict[str | None, Forecast]:
        """A `PromptModel`: frequencies of tasks in `past` and of those known from training."""
        bases = decayed_frequencies(past, self.shape)
        names = [None, *dict.fromkeys([*self.tasks, *(prompt.task for prompt in past)])]
        questions = [Question(past, name, period, bases.get(name, bases[None])) for name in names]
        return dict(zip(names, self(questions).sigmoid().numpy(), strict=True))

    def _states(self, pasts: Sequence[Sequence[PastPrompt]]) -> torch.Tensor:
        """What is known after each of `pasts`, [pasts, hidden]; where there are fewer prompts, none come first."""
        window, cells = self.sizes.window, self.shape.layers * self.shape.experts
        shares = np.zeros((len(pasts), window, cells), np.float32)
        tasks = np.full((len(pasts), window), len(self.tasks))
        for row, past in enumerate(pasts):
            for place, prompt in enumerate(reversed(past[-window:])):
                shares[row, -1 - place] = prompt.counts.reshape(-1) / prompt.tokens
                tasks[row, -1 - place] = self._row(prompt.task)
        read = self.read(torch.from_numpy(shares)) + self.task(torch.from_numpy(tasks))
        state: torch.Tensor = self.recurrent(read)[1]
        return state[0]

    def _row(self, task: str | None) -> int:
        return self.tasks.index(task) if task in self.tasks else len(self.tasks)

    def artifact(self, model: str, **params: Any) -> Artifact:
        """This network on disk, with further params; weights in half precision."""
        arrays = {name: weight.detach().half().numpy() for name, weight in self.named_parameters()}
        about = {"sizes": asdict(self.sizes), "tasks": list(self.tasks), **params}
        return Artifact(KIND, model, self.shape, about, arrays)

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The network of an artefact, in float32, ready for inference.

        Raises:
            ArtifactError: its sizes and its weights do not make a network.
        """
        try:
            sizes, tasks = Sizes(**sizes_of(artifact)), [str(task) for task in artifact.params["tasks"]]
            check_weights(lambda: cls(sizes, artifact.shape, tasks), artifact.arrays)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                network = cls(sizes, artifact.shape, tasks).float()
            weights = {name: torch.from_numpy(np.array(array)).float() for name, array in artifact.arrays.items()}
            network.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                f"the {KIND} predictor of {artifact.model} is damaged ({type(error).__name__}: {reason}); "
                f"train it again: python -m harness.fit {KIND}"
            ) from error
        return network.eval().requires_grad_(False)


_LEAST_SHARE = 1e-3  # whose logit is told from that of less
