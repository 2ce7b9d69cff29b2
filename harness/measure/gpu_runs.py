"""One system on a GPU, in a process of its own: batch-1 decode of held-out text, and the prefill of one long prompt.

A contender of `harness.measure.contenders`; its public methods are what the parent asks for. An offloaded system is
opened anew for every residency: what one needed is no part of what the next is said to need.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from harness.measure.contenders import Contender, EngineContender
from harness.measure.gpu_systems import Systems
from harness.measure.runner import Decoder, replay
from harness.measure.workload import TokenRequest, cut, load_workload, passages
from runtime import machine
from runtime.model import read_tokenizer

if TYPE_CHECKING:
    from runtime.engine import Engine

JsonDict = dict[str, Any]

PREFILL_REPEATS = 3
READ_BYTES = 1 << 30  # of a buffer that is read: many times what a GPU's caches hold
_READS, _READ_REPEATS = 8, 5
_PROFILED_TOKENS = 9  # more would take minutes to sum up


@dataclass(frozen=True)
class GpuWorkload:
    """What every system runs: requests to decode, the first of which only warms up, and one long prompt."""

    requests: tuple[TokenRequest, ...]
    long_prompt: tuple[int, ...]

    @classmethod
    def of(
        cls, checkpoint: Path, *, num_requests: int, prompt_tokens: int, output_tokens: int, long_tokens: int
    ) -> GpuWorkload:
        """From the bundled held-out text; raises WorkloadError where that has too little."""
        tokenizer, workload = read_tokenizer(str(checkpoint)), load_workload()
        requests = cut(
            workload,
            tokenizer,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            num_requests=num_requests + 1,
            part="confirm",
        )
        text = "\n".join(passage.text for passage in passages(workload, "search"))
        ids = tokenizer(text[: 16 * long_tokens], add_special_tokens=False, verbose=False)["input_ids"]
        return cls(requests, tuple(ids[:long_tokens]))


class GpuContender:
    """The systems of one kind, one of them open at a time. Figures of memory are those since it was opened."""

    def __init__(self, kind: str, systems: Systems) -> None:
        self._kind, self._systems, self._device = kind, systems, systems.device
        self._model: Any = None
        self._engine: Engine | None = None
        self._contender: Contender | None = None

    def facts(self) -> JsonDict:
        """What the GPU is."""
        return {"gpu": gpu_facts(self._device)}

    def open(self, overrides: Mapping[str, Any]) -> JsonDict:
        """Load it; what is known then. `slots` is there for an engine that has some."""
        self.shut()
        machine.reset_peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        self._model, self._engine = self._systems.make(self._kind, overrides)
        found: JsonDict = {"overrides": dict(overrides), "load_s": time.perf_counter() - start}
        if self._engine is None:
            self._contender = Contender(self._model)
            return found
        # Measured with the slots that it was given.
        self._engine.pressure = None
        self._contender = _EngineContender(self._engine, self._device)
        found["notes"] = list(self._engine.notes)
        if self._engine.num_pools:
            found["slots"] = self._engine.num_slots
            found["slots_bytes"] = sum(pool.arena.num_slots * pool.arena.slot_bytes for pool in self._engine._pools)
        return found

    def run(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> JsonDict:
        """Prefill `prompt_ids`, then replay `output_ids`; see `Contender.run`."""
        assert self._contender is not None, "nothing is open"
        return self._contender.run(prompt_ids, output_ids)

    def replay_loads(self) -> JsonDict:
        """Time the loads that the last run's decode needed. None where each is waited for: that is another path."""
        if self._kind == "gpu_synchronous" or not isinstance(self._contender, EngineContender):
            return {"replay_s": None}
        return self._contender.replay_loads()

    def demands(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> JsonDict:
        """The distinct experts (ids over all layers) that each layer step of the decode needs; untimed."""
        assert self._engine is not None, "only an engine of ours says what its routers chose"
        _, num_experts = self._engine.routing_shape
        steps: list[list[int]] = []

        def observe(layer: int, choice: npt.NDArray[np.int64], weights: torch.Tensor) -> None:
            steps.append([layer * num_experts + expert for expert in np.unique(choice).tolist()])

        request = TokenRequest("bench", "bench", tuple(prompt_ids), tuple(output_ids))
        stop = self._engine.observe_routing(observe)
        try:
            replay(self._model, [request], on_decode=steps.clear)
        finally:
            stop()
        return {"demands": steps}

    @torch.inference_mode()
    def prefill(self, prompt_ids: Sequence[int]) -> JsonDict:
        """Seconds of prefilling `prompt_ids`, by repeat, and of a replay of its loads alone; the first one warms up."""
        engine, rows = self._engine, list[JsonDict]()
        logits = torch.empty(0)
        for _ in range(1 + PREFILL_REPEATS):
            if engine is not None:
                engine.reset_stats()
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            logits = Decoder(self._model).logits(prompt_ids).float().cpu()
            row: JsonDict = {"prefill_s": time.perf_counter() - start}
            if engine is not None and engine.num_pools:
                torch.cuda.synchronize(self._device)
                needed, moved = tuple(engine.needed_loads or ()), engine.stats()
                row |= {"num_loads": moved.num_loads, "num_bytes": moved.num_bytes, "needed_loads": len(needed)}
                can_replay = engine.num_pools == 1 and self._kind == "gpu_engine"
                row["replay_s"] = engine.replay_loads(needed) if can_replay else None
            rows.append(row)
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        return {"num_tokens": len(prompt_ids), "repeats": rows[1:], "logits_sha256": digest}

    def memory(self) -> JsonDict:
        """Peaks, and what is held between passes."""
        gc.collect()
        return {
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(self._device),
            "peak_reserved_gpu_bytes": torch.cuda.max_memory_reserved(self._device),
            "held_gpu_bytes": torch.cuda.memory_allocated(self._device),
            "peak_host_bytes": machine.peak_resident_bytes(),
        }

    def memory_rate(self) -> JsonDict:
        """Bytes per second at which the GPU reads its memory, and how that was measured."""
        return {"memory_bytes_per_s": read_bytes_per_s(self._device), "how": READ_HOW}

    def profile(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> JsonDict:
        """Tables of what the host and the GPU spend the time of a short request on."""
        from torch.profiler import profile, supported_activities

        few = tuple(output_ids[:_PROFILED_TOKENS])
        request = TokenRequest("bench", "bench", tuple(prompt_ids), few)
        with profile(activities=supported_activities()) as seen:
            start = time.perf_counter()
            replay(self._model, [request])
            seconds = time.perf_counter() - start
        averages = seen.key_averages()
        tables = [averages.table(sort_by=by, row_limit=25) for by in ("self_cpu_time_total", "self_cuda_time_total")]
        head = f"{seconds:.4f} s for the prefill of {len(prompt_ids)} tokens and {len(few) - 1} decode steps"
        return {"text": "\n".join([head, *tables]) + "\n"}

    def shut(self) -> JsonDict:
        """Give everything back; another one can be opened then."""
        if self._engine is not None:
            self._engine.close()
        self._model = self._engine = self._contender = None
        gc.collect()
        torch.cuda.empty_cache()
        return {}

    def close(self) -> JsonDict:
        return self.shut()


class _EngineContender(EngineContender):
    """Counts when all copies have ended."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        super().__init__(engine)
        self._device = device

    def _end_decode(self) -> JsonDict:
        if not self._engine.num_pools:
            return {}
        torch.cuda.synchronize(self._device)
        return super()._end_decode()


READ_HOW = f"torch.sum of {READ_BYTES >> 20} MiB of float32, {_READS} in a row, best of {_READ_REPEATS}"


def read_bytes_per_s(device: torch.device) -> float:
    """Best rate at which a kernel that does nothing else reads a buffer in the memory of `device`."""
    buffer = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(1 + _READ_REPEATS):  # the first one compiles and chooses
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_READS):
            buffer.sum()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return _READS * READ_BYTES / min(seconds[1:])


def gpu_facts(device: torch.device) -> JsonDict:
    """Name, memory and software of a GPU."""
    from harness.hardware.nvml import read_gpus

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": read_gpus().driver.value,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def build(kind: str, checkpoint: str, device: str) -> GpuContender:
    """The contender of a process; nothing is loaded yet.

    Raises:
        DeviceError: there is no such GPU.
    """
    from runtime.devices import find_device
    from runtime.profile import Profile

    machine.return_freed_memory()
    return GpuContender(kind, Systems(checkpoint, find_device(device, Profile.default())))
