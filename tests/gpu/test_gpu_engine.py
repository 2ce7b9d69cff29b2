"""The engine on a real GPU equals the resident model on it, through the same kernels, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import runtime
from harness.demo.widen import bundled_model
from harness.measure.runner import Decoder
from runtime import build
from runtime.cuda_driver import CudaDriver
from runtime.facts import CUDA_BUFFER_BYTES
from runtime.profile import Match, Profile
from runtime.readback import CudaReader

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return [line.rstrip() for line in file]\n\n\n"
STEPS = 24
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NO_PREFETCH: dict[str, Any] = {"prefetch.depth": 0}


def kernels(prefill: str, decode: str) -> dict[str, Any]:
    return {"compute.prefill": prefill, "compute.decode": decode}


@cache
def ids() -> tuple[int, ...]:
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": 1}) as engine:
        return tuple(engine.tokenizer(TEXT)["input_ids"])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Of a prefill and of decode steps that are fed the text, [1 + STEPS, vocabulary]."""
    tokens, decoder = ids(), Decoder(model)
    found = [decoder.logits(tokens[:-STEPS])]
    found += [decoder.logits([token]) for token in tokens[-STEPS:]]
    return torch.stack(found).cpu()


@cache
def resident(prefill: str, decode: str, dtype: str) -> torch.Tensor:
    overrides = kernels(prefill, decode)
    with runtime.load_reference(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as reference:
        return logits(reference.model)


@pytest.mark.parametrize(
    ("prefill", "decode", "dtype"),
    [
        ("grouped_mm", "eager", "bf16"),
        ("grouped_mm", "grouped_mm", "bf16"),
        ("eager", "eager", "bf16"),
        ("grouped_mm", "eager", "fp32"),
    ],
)
@pytest.mark.parametrize("slots", [1, 4, "25%", "100%"])
def test_logits_equal_the_resident_models_to_the_bit(prefill: str, decode: str, dtype: str, slots: int | str) -> None:
    overrides = kernels(prefill, decode) | {"cache.slots": slots}
    expected = resident(prefill, decode, dtype)
    assert expected.isfinite().all() and expected.std() > 0.1
    with runtime.load(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as engine:
        assert engine.model.device == torch.device(DEVICE)
        for _ in range(2):  # with an empty cache, and with a full one
            assert torch.equal(logits(engine.model), expected)
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_loads > 0 and stats.cache.num_lookups > 0


@cache
def long_prompt() -> torch.Tensor:
    """[1, tokens], more than a thousand: nearly every expert of every layer is needed."""
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": 1}) as engine:
        ids = engine.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    repeats = -(-1024 // ids.shape[1])
    return ids.repeat(1, repeats)


@torch.inference_mode()
def prompt_logits(model: Any) -> list[torch.Tensor]:
    """Of a long prompt, [tokens, vocabulary], twice: the second finds the slots as the first has left them."""
    return [model(long_prompt().to(DEVICE)).logits[0].cpu() for _ in range(2)]


@cache
def resident_prompt(prefill: str, dtype: str) -> torch.Tensor:
    overrides = kernels(prefill, "eager")
    with runtime.load_reference(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as reference:
        first, second = prompt_logits(reference.model)
    assert torch.equal(first, second), "the resident model itself does not repeat its bits"
    return first


@pytest.mark.parametrize(("prefill", "dtype"), [("grouped_mm", "bf16"), ("eager", "bf16"), ("grouped_mm", "fp32")])
@pytest.mark.parametrize("slots", [1, 4, 16, "25%", "50%", "100%"])
def test_a_long_prompt_streams_whole_layers_and_changes_nothing(prefill: str, dtype: str, slots: int | str) -> None:
    expected = resident_prompt(prefill, dtype)
    assert expected.isfinite().all() and expected.std() > 0.1
    overrides = kernels(prefill, "eager") | NO_PREFETCH | {"cache.slots": slots}
    with runtime.load(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as engine:
        for found in prompt_logits(engine.model):
            assert torch.equal(found, expected)
        engine.check_integrity()
        used = engine.stats().cache.num_prefetch_used
        assert used > 0, "nothing was loaded ahead of a router"
        num_layers, num_experts = engine.routing_shape
        num_loads = engine.stats().num_loads
        assert num_loads <= 2 * num_layers * num_experts, "an expert was loaded more than once in a pass"


@pytest.mark.parametrize(
    "overrides", [NO_PREFETCH, {"prefetch.depth": 2, "prefetch.count": 4, "prefetch.on_trial": False}]
)
def test_prefetching_changes_nothing(overrides: dict[str, Any]) -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": "25%", **overrides}) as engine:
        assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", "bf16"))
        issued = engine.stats().cache.num_prefetch_issued
        assert (issued > 0) == (overrides["prefetch.depth"] > 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_against_plain_transformers(dtype: str, kernel: str, record_property: Callable[[str, object], None]) -> None:
    """Where both phases name one kernel the reference is transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=DTYPES[dtype], experts_implementation=kernel)
    plain, ours = logits(model.eval().to(DEVICE)), resident(kernel, kernel, dtype)
    difference = (plain.float() - ours.float()).abs().max().item()
    record_property("largest_difference", difference)
    print(f"{kernel} {dtype}: equal {torch.equal(plain, ours)}, largest difference {difference:.3g}")
    assert difference < (0.5 if dtype == "bf16" else 1e-2)


@pytest.mark.parametrize(
    "prefetch",
    [NO_PREFETCH, *({"prefetch.depth": depth, "prefetch.on_trial": False} for depth in (1, 2, 3))],
    ids=lambda overrides: f"depth {overrides['prefetch.depth']}",
)
def test_one_host_synchronisation_per_layer(prefetch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, which go past torch and are counted by the reader, and torch's own, which it warns of."""
    readers: list[CudaReader] = []

    def reader_for(device: torch.device) -> CudaReader:
        readers.append(CudaReader(CudaDriver(device)))
        return readers[-1]

    monkeypatch.setattr(build, "reader_for", reader_for)
    overrides = {"cache.slots": "25%", "predictor.kind": "gate_lookahead", **prefetch}
    with runtime.load(bundled_model(), device=DEVICE, overrides=overrides) as engine:
        (reader,), decoder = readers, Decoder(engine.model)
        with torch.inference_mode():
            decoder.logits(ids()[:-STEPS])
            for token in ids()[-STEPS:-8]:
                decoder.logits([token])
            before = reader.num_waits
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    decoder.logits([ids()[-8]])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        where = [f"{one.filename}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
        num_layers, _ = engine.routing_shape
        print("\n".join(sorted(set(where))))
        assert reader.num_waits - before == num_layers
        assert len(where) <= 1  # the token's way to the device
        assert (engine.stats().cache.num_prefetch_issued > 0) == (prefetch["prefetch.depth"] > 0)


def test_tensors_come_as_the_device_has_them() -> None:
    """Also those that it has not computed yet, on a stream of their own."""
    reader = CudaReader(CudaDriver(torch.device(DEVICE)))
    generator = torch.Generator(DEVICE).manual_seed(0)
    for stream in (torch.cuda.current_stream(DEVICE), torch.cuda.Stream(DEVICE)):
        with torch.cuda.stream(stream):
            for size in (1, 1000, 300_000):
                torch.cuda._sleep(4_000_000)
                wide = torch.randn(size, 6, device=DEVICE, generator=generator)
                wanted = [wide.argsort(dim=1), wide.bfloat16(), wide[:, 1::2], wide.t(), wide.isnan(), wide[:0]]
                found = reader(wanted)
                for one, other in zip(found, wanted, strict=True):
                    assert one.device.type == "cpu" and torch.equal(one, other.cpu())
    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaDriver(torch.device(DEVICE)).download(0, 0, 16)


def test_token_ids_are_read_only_where_somebody_looks() -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": "25%"}) as engine:
        engine.start_trace()
        logits(engine.model)
        recorded = engine.trace().token_ids
        assert recorded is not None and tuple(recorded.tolist()) == ids()


def test_a_profile_of_this_gpu_runs_on_it() -> None:
    name = f"cuda:{torch.cuda.get_device_name(0)}"
    tuned = Profile.default().model_copy(update={"match": Match(device=name)})
    with runtime.load(tuned, bundled_model(), overrides={"cache.slots": 8}) as engine:
        assert engine.model.device == torch.device(DEVICE)
        assert engine.profile.compute.decode == "eager"
        text = engine.model.generate(  # type: ignore[operator]
            **engine.tokenizer("def f(", return_tensors="pt").to(DEVICE), max_new_tokens=8, do_sample=False
        )
        assert text.shape[1] > 8


def test_fewer_slots_and_more_again_change_nothing() -> None:
    expected = resident("grouped_mm", "eager", "bf16")
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": "50%", **NO_PREFETCH}) as engine:
        assert torch.equal(logits(engine.model), expected)
        (pool,) = engine._pools
        num_bytes, before = engine.stats().num_bytes, set(pool.coordinator.residency.resident())
        assert engine.shrink(16) == 0 and engine.num_slots == 16
        assert engine.stats().num_bytes == num_bytes and set(pool.coordinator.residency.resident()) < before
        assert torch.equal(logits(engine.model), expected)
        engine.grow()
        assert torch.equal(logits(engine.model), expected)
        engine.check_integrity()


def test_threads_on_streams_of_their_own_get_the_same() -> None:
    expected = resident("grouped_mm", "eager", "bf16")
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": 12}) as engine:

        def run(_: int) -> torch.Tensor:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                return logits(engine.model)

        logits(engine.model)
        with ThreadPoolExecutor(4) as threads:
            watching = threads.submit(lambda: [engine.stats().num_loads for _ in range(2000)])
            for found in threads.map(run, range(6)):
                assert torch.equal(found, expected)
            seen = watching.result()
        assert seen == sorted(seen) and seen[-1] > 0
        engine.check_integrity()


def test_slots_that_do_not_fit_are_fewer_and_said() -> None:
    limit = {"limits.max_memory_bytes": CUDA_BUFFER_BYTES + (16 << 20)}
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": "100%", **limit}) as engine:
        slots = engine.profile.cache.slots
        assert isinstance(slots, int) and 0 < slots < 256
        assert any(f"{slots} fit the memory" in note for note in engine.notes)
        assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", "bf16"))
