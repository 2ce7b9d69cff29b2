"""Misses that the CPU computes while a real GPU goes on.

float32 products summed in another order stay within 1e-3 of the logits' spread after eight layers; bfloat16 ones, whose
activations are rounded to 8 bits after each step, within a quarter.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

import runtime
from harness.demo.widen import bundled_model
from harness.measure.runner import Decoder
from runtime import build
from runtime.cuda_driver import CudaDriver
from runtime.readback import CudaReader

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return [line.rstrip() for line in file]\n\n\n"
STEPS = 24
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 0.25, "fp32": 1e-3}
COMPUTE: dict[str, Any] = {
    "miss": "compute",
    "numerics": "equivalent",
    "cache.slots": "25%",
    "prefetch.depth": 0,
    "compute.threads": 4,
}


@torch.inference_mode()
def logits(engine: runtime.Engine) -> torch.Tensor:
    """Of a prefill and of decode steps that are fed the text, [1 + STEPS, vocabulary]."""
    tokens, decoder = engine.tokenizer(TEXT)["input_ids"], Decoder(engine.model)
    found = [decoder.logits(tokens[:-STEPS])]
    found += [decoder.logits([token]) for token in tokens[-STEPS:]]
    return torch.stack(found).float().cpu()


@cache
def resident(kernel: str, dtype: str) -> torch.Tensor:
    overrides = {"compute.prefill": kernel, "compute.decode": kernel}
    with runtime.load_reference(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as reference:
        return logits(reference)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "how", [{}, {"miss": "auto"}, {"miss": "auto", "compute.host_share": 0.5}, {"prefetch.depth": 2}]
)
def test_results_stay_close(kernel: str, dtype: str, how: dict[str, Any]) -> None:
    overrides = {"compute.prefill": kernel, "compute.decode": kernel, **COMPUTE, **how}
    expected = resident(kernel, dtype)
    assert expected.isfinite().all() and expected.std() > 0.1
    with runtime.load(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as engine:
        for _ in range(3):  # with an empty cache, and with a full one
            assert far(logits(engine), expected) < TOLERANCE[dtype]
        engine.check_integrity()
        cache, loads = engine.stats().cache, engine.stats().num_loads
        print([note for note in engine.notes if "a miss takes" in note], cache.num_computed, cache.num_misses)
        assert loads > 0 and cache.num_computed <= cache.num_misses
        if how != {"miss": "auto"}:  # whose split is this machine's affair
            assert cache.num_computed > 0


def test_the_rates_are_positive_and_said() -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides={**COMPUTE, "miss": "auto"}) as engine:
        (pool,) = engine._pools
        assert pool.coordinator.misses is not None
        rates = pool.coordinator.misses.split.rates
        assert rates.copy_s > 0 and rates.compute_s(1) > 0
        assert sum("ms to copy and" in note for note in engine.notes) == 1
        assert engine.stats().num_loads == 0


def test_the_hidden_states_take_no_synchronisation_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the router's choice; what else is sent, either way, the host does not wait for. Our own waits go
    past torch, which warns of the others."""
    readers: list[CudaReader] = []

    def reader_for(device: torch.device) -> CudaReader:
        readers.append(CudaReader(CudaDriver(device)))
        return readers[-1]

    monkeypatch.setattr(build, "reader_for", reader_for)
    with runtime.load(bundled_model(), device=DEVICE, overrides=COMPUTE) as engine:
        (reader,), decoder = readers, Decoder(engine.model)
        tokens = engine.tokenizer(TEXT)["input_ids"]
        with torch.inference_mode():
            decoder.logits(tokens[:-STEPS])
            for token in tokens[-STEPS:-8]:
                decoder.logits([token])
            before, num_waits = engine.stats().cache.num_computed, reader.num_waits
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    decoder.logits([tokens[-8]])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert engine.stats().cache.num_computed > before
        where = [f"{one.filename}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
        num_layers, _ = engine.routing_shape
        print("\n".join(sorted(set(where))))
        assert reader.num_waits - num_waits == num_layers
        assert len(where) <= 2  # the token's way to the device, and what a model's mask may ask


def test_a_long_prompt_is_copied() -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides={**COMPUTE, "miss": "auto"}) as engine:
        ids = torch.tensor([(engine.tokenizer(TEXT)["input_ids"] * 40)[:1024]], device=DEVICE)
        with torch.inference_mode():
            engine.model(ids)
            engine.reset_stats()
            engine.model(ids)
        cache = engine.stats().cache
        print(cache.num_computed, cache.num_misses)
        assert cache.num_computed < cache.num_misses / 4
