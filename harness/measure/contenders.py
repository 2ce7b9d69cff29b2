"""One contender of the bench in a process of its own: it loads its model, then answers requests, JSON lines over pipes.

Started by `harness.measure.process` as `python -m harness.measure.contenders SPEC`. Only the standard library is
imported before the process has joined its memory cgroup, so that everything it allocates is charged there.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from harness.measure.cgroup import join

if TYPE_CHECKING:
    from harness.measure.batch_contender import BatchContender
    from harness.measure.gpu_runs import GpuContender
    from runtime.engine import Engine
    from runtime.vocabulary import Load

JsonDict = dict[str, Any]


class Contender:
    """A model that decodes by replay. Figures are those of the decode phase, from the first token to the last."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def facts(self) -> JsonDict:
        """What is known after loading."""
        from runtime import machine

        return {"peak_resident_bytes": machine.peak_resident_bytes()}

    def run(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> JsonDict:
        """Prefill `prompt_ids`, then replay `output_ids`."""
        from harness.measure.runner import replay
        from harness.measure.workload import TokenRequest
        from runtime import machine

        read: list[int | None] = []

        def begin() -> None:
            self._begin_decode()
            read.append(machine.bytes_read_from_disk())

        request = TokenRequest("bench", "bench", tuple(prompt_ids), tuple(output_ids))
        (result,) = replay(self._model, [request], on_decode=begin).requests
        read.append(machine.bytes_read_from_disk())
        return {
            "decode_s": result.finish_s - result.first_token_s,
            "decode_tokens": result.num_tokens - 1,
            "ttft_ms": result.ttft_ms,
            "predicted_ids": list(result.predicted_ids),
            "read_bytes": None if read[0] is None or read[1] is None else read[1] - read[0],
            "peak_resident_bytes": machine.peak_resident_bytes(),
            **self._end_decode(),
        }

    def close(self) -> JsonDict:
        """Nothing to give back."""
        return {}

    def _begin_decode(self) -> None:
        """Start counting."""

    def _end_decode(self) -> JsonDict:
        """What was counted."""
        return {}


class EngineContender(Contender):
    """Our engine, offloaded: counts what its cache and its transfer did."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model)
        self._engine = engine
        self._needed: tuple[Load, ...] = ()

    def facts(self) -> JsonDict:
        """Adds the slots and the notes of the engine."""
        return {**super().facts(), "slots": self._engine.profile.cache.slots, "notes": list(self._engine.notes)}

    def replay_loads(self) -> JsonDict:
        """Time the loads that the last run's decode needed, through the same transfer, without compute.

        None for a model whose experts differ in shape: the engine then has several pools and replays none of them.
        """
        return {"replay_s": self._engine.replay_loads(self._needed) if self._engine.num_pools == 1 else None}

    def close(self) -> JsonDict:
        """Stop the I/O threads."""
        self._engine.close()
        return {}

    def _begin_decode(self) -> None:
        self._engine.reset_stats()

    def _end_decode(self) -> JsonDict:
        self._needed = tuple(self._engine.needed_loads or ())
        return {"stats": self._engine.stats().as_dict(), "needed_loads": len(self._needed)}


class ReferenceContender(Contender):
    """The resident model through our kernels: what ours must equal, and the record of what every layer demanded."""

    def __init__(self, engine: Engine) -> None:
        from harness.measure.baselines import experts_modules, own_weights

        super().__init__(engine.model)
        own_weights(engine.model)
        self._chosen: list[tuple[int, Any]] = []
        for layer, module in enumerate(experts_modules(engine.model).values()):
            self._num_experts = int(module.num_experts)  # type: ignore[arg-type]
            module.register_forward_pre_hook(self._hook(layer))

    def memory_rate(self) -> JsonDict:
        """Bytes per second at which this process reads memory."""
        from harness.measure.baselines import memory_bytes_per_s

        return {"memory_bytes_per_s": memory_bytes_per_s()}

    def _hook(self, layer: int) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda module, arguments: self._chosen.append((layer, arguments[1]))

    def _begin_decode(self) -> None:
        self._chosen.clear()

    def _end_decode(self) -> JsonDict:
        chosen = ((layer, sorted(set(index.flatten().tolist()))) for layer, index in self._chosen)
        return {"demands": [[layer * self._num_experts + expert for expert in step] for layer, step in chosen]}


def build(spec: JsonDict) -> Contender | BatchContender | GpuContender:
    """The contender that `spec` describes; see `harness.measure.process.Spec`."""
    import torch

    torch.set_num_threads(spec["threads"])
    model, kind = spec["model"], spec["kind"]
    if kind in ("engine", "reference"):
        import runtime
        from runtime.profile import Profile

        profile = spec["profile"] or Profile.default()
        if kind == "reference":
            return ReferenceContender(runtime.load_reference(profile, model, overrides=spec["overrides"]))
        engine = runtime.load(profile, model, overrides=spec["overrides"], record_loads=True)
        engine.pressure = None  # measured with the slots that it was given
        return EngineContender(engine)
    if kind in ("batch", "batch_resident"):
        from harness.measure import batch_contender

        return batch_contender.build(spec)
    if kind.startswith("gpu_"):
        from harness.measure import gpu_runs

        return gpu_runs.build(kind, model, spec["device"])
    from harness.measure import baselines

    if kind == "resident":
        loaded = baselines.load_plain(model, spec["implementation"])
        baselines.own_weights(loaded)
        return Contender(loaded)
    from runtime.model import meta_model

    return Contender(
        baselines.load_accelerate(
            model,
            meta_model(model).model,
            whole_layers=kind == "accelerate_layers",
            implementation=spec["implementation"],
            folder=Path(spec["folder"]),
        )
    )


def _private_stdout() -> TextIO:
    """The pipe to the parent, under a descriptor of its own; whatever libraries print goes to stderr from now on."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def _answer(work: Callable[[], JsonDict]) -> JsonDict:
    try:
        return work()
    except Exception as error:  # everything becomes an answer: the parent decides what it means
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def main(argument: str) -> int:
    """Load what the JSON in `argument` describes, then answer `{"op": …}` lines until `close` or the end of input."""
    spec = json.loads(argument)
    if spec["cgroup"] is not None:
        join(spec["cgroup"])
    channel = _private_stdout()
    contender: list[Contender | BatchContender | GpuContender] = []

    def load() -> JsonDict:
        contender.append(build(spec))
        return contender[0].facts()

    answer = _answer(load)
    print(json.dumps(answer), file=channel)
    for line in sys.stdin if contender else ():
        request = json.loads(line)
        op = request.pop("op")
        answer = _answer(partial(getattr(contender[0], op), **request))
        print(json.dumps(answer), file=channel)
        if op == "close":
            return 0
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
