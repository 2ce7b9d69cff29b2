"""Runs of one system on a GPU: batch-1 decode of held-out text, and the prefill of one long prompt."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.measure.runner import Decoder, replay
from harness.measure.stats import median
from harness.measure.workload import TokenRequest, cut, load_workload, passages
from runtime import machine
from runtime.model import read_tokenizer

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.prompts import RequestResult

PREFILL_REPEATS = 3


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


class System:
    """A model on a GPU that decodes by replay. `close` gives everything back."""

    def __init__(self, model: Any, engine: Engine | None, device: torch.device) -> None:
        self._model, self._engine, self._device = model, engine, device

    def measure(self, workload: GpuWorkload) -> dict[str, Any]:
        """Decode figures by request, those of the prefill, and peaks of memory. Bytes are counted while decoding."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        replay(self._model, workload.requests[:1])
        self._counts: list[dict[str, Any]] = []
        run = replay(self._model, workload.requests[1:], on_decode=self._begin, on_finish=self._finish)
        decode_s = [one.finish_s - one.first_token_s for one in run.requests]
        steps = [one.num_tokens - 1 for one in run.requests]
        rows = [
            {"decode_s": seconds, "steps": number, "ttft_ms": one.ttft_ms, **counted}
            for seconds, number, one, counted in zip(decode_s, steps, run.requests, self._counts, strict=True)
        ]
        found: dict[str, Any] = {
            "tokens_per_s": sum(steps) / sum(decode_s),
            "tpot_ms_p50": median([1e3 * seconds / number for seconds, number in zip(decode_s, steps, strict=True)]),
            "sha256": run.sha256,
            "requests": rows,
        }
        found |= _totals(rows)
        found["decode_peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self._device)
        found["prefill"] = self._prefill(workload.long_prompt)
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self._device)
        found["peak_reserved_gpu_bytes"] = torch.cuda.max_memory_reserved(self._device)
        found["peak_host_bytes"] = machine.peak_resident_bytes()
        return found

    def step_s(self, request: TokenRequest) -> float:
        """Seconds of replaying one request; for profilers."""
        start = time.perf_counter()
        replay(self._model, [request])
        return time.perf_counter() - start

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._model = self._engine = None
        gc.collect()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        if not prompt:
            return {}
        seconds, moved, digest = list[float](), list[int](), hashlib.sha256()
        for _ in range(PREFILL_REPEATS):
            if self._engine is not None:
                self._engine.reset_stats()
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            digest.update(repr(Decoder(self._model).step(prompt)).encode())
            seconds.append(time.perf_counter() - start)
            moved.append(self._engine.stats().num_bytes if self._engine is not None else 0)
        return {"tokens": len(prompt), "seconds": seconds, "bytes": moved, "sha256": digest.hexdigest()}

    def _begin(self) -> None:
        if self._engine is not None:
            self._engine.reset_stats()

    def _finish(self, result: RequestResult) -> None:
        self._counts.append(self._end())

    def _end(self) -> dict[str, Any]:
        if self._engine is None or not self._engine.num_pools:
            return {}
        torch.cuda.synchronize(self._device)
        stats, needed = self._engine.stats(), tuple(self._engine.needed_loads or ())
        cache = stats.cache
        counted: dict[str, Any] = {
            "num_bytes": stats.num_bytes,
            "num_loads": stats.num_loads,
            "busy_s": stats.busy_s,
            "stall_s": stats.stall_s,
            "hits": cache.num_hits,
            "in_flight": cache.num_in_flight,
            "misses": cache.num_misses,
            "prefetched": cache.num_prefetch_issued,
            "wasted": cache.num_prefetch_wasted,
        }
        return {**counted, "needed_loads": len(needed), "replay_s": self._engine.replay_loads(needed)}


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per token and per lookup, over all requests; nothing for a resident model."""
    if "num_bytes" not in rows[0]:
        return {}
    steps = sum(row["steps"] for row in rows)
    lookups = sum(row["hits"] + row["in_flight"] + row["misses"] for row in rows)
    return {
        "bytes_per_token": sum(row["num_bytes"] for row in rows) / steps,
        "hit_rate": sum(row["hits"] for row in rows) / lookups,
        "in_flight_rate": sum(row["in_flight"] for row in rows) / lookups,
        "replay_ms_per_token": 1e3 * sum(row["replay_s"] for row in rows) / steps,
        "stall_ms_per_token": 1e3 * sum(row["stall_s"] for row in rows) / steps,
        "busy_ms_per_token": 1e3 * sum(row["busy_s"] for row in rows) / steps,
    }


@dataclass(frozen=True)
class Systems:
    """Makes the systems that are compared, each from the checkpoint."""

    checkpoint: Path
    device: torch.device

    def resident(self, overrides: Mapping[str, Any]) -> System:
        """The whole model on the GPU through our kernels: what ours must equal to the bit."""
        import runtime

        engine = runtime.load_reference(self.checkpoint, device=self.device, overrides=overrides)
        return System(engine.model, engine, self.device)

    def offloaded(self, overrides: Mapping[str, Any]) -> System:
        """Our engine."""
        import runtime

        engine = runtime.load(self.checkpoint, device=self.device, overrides=overrides, record_loads=True)
        return System(engine.model, engine, self.device)

    def transformers(self, overrides: Mapping[str, Any]) -> System:
        """The whole model on the GPU as transformers runs it."""
        return System(self._plain.to(self.device), None, self.device)

    def accelerate(self, overrides: Mapping[str, Any]) -> System:
        """Accelerate's CPU offload: every weight in host memory, copied before its module runs. Needs accelerate."""
        from accelerate.big_modeling import cpu_offload

        return System(_OnDevice(cpu_offload(self._plain, self.device), self.device), None, self.device)

    @property
    def _plain(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype="auto").eval()


class _OnDevice:
    """A model whose weights say that they are nowhere, with the device that it computes on."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self._model = model

    @cached_property
    def forward(self) -> Callable[..., Any]:
        forward: Callable[..., Any] = self._model.forward
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)
