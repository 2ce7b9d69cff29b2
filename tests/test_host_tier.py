"""The way of a GPU through the engine, experts in host memory and slots elsewhere, on streams that this machine can
run: a copy happens when the computation asks for it, and not before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from late_streams import LateStreams, compute_late
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import devices, loading
from runtime.errors import DeviceError, ProfileError, TransferError, UsageError
from runtime.model import load_offloaded, load_resident
from runtime.probe import gpu_bandwidth
from runtime.profile import Match, Profile, machine_facts
from runtime.transfer.cuda import Lane
from runtime.transfer.host_slab import ALIGNMENT_BYTES, HostSlab
from runtime.transfer.store import ExpertStore

PROMPT = "the quick brown fox jumps"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_late(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _tokens(engine: runtime.Engine) -> list[int]:
    ids = engine.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found: list[int] = engine.model.generate(ids, **GREEDY)[0].tolist()  # type: ignore[operator]
    return found


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("decode", ["eager", "grouped_mm"])
@pytest.mark.parametrize("slots", [1, TOP_K, "25%", LAYERS * EXPERTS])
def test_the_same_tokens_at_every_budget(checkpoint: Path, slots: int | str, decode: str) -> None:
    overrides = {"cache.slots": slots, "compute.decode": decode}
    with runtime.load_reference(checkpoint, overrides=overrides) as reference:
        expected = _tokens(reference)
    with runtime.load(checkpoint, overrides=overrides) as engine:
        assert _tokens(engine) == expected
        engine.check_integrity()
        assert engine.stats().num_loads > 0
        assert engine.replay_loads([]) >= 0.0
        assert any("pinned host memory" in note for note in engine.notes)


@torch.inference_mode()
def _logits(engine: runtime.Engine, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of a prompt, of a token, and of the prompt once more with the slots as that left them."""
    return [engine.model(tokens).logits for tokens in (ids, ids[:, :1], ids)]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("prefill", ["eager", "grouped_mm"])
@pytest.mark.parametrize("slots", [1, 4, "25%", EXPERTS, "100%"])
def test_a_long_prompt_streams_and_equals_the_resident_model(checkpoint: Path, slots: int | str, prefill: str) -> None:
    overrides = {"cache.slots": slots, "compute.prefill": prefill}
    with runtime.load_reference(checkpoint, overrides=overrides) as reference:
        ids = torch.arange(400)[None] * 7 % reference.model.config.vocab_size
        expected = _logits(reference, ids)
    assert expected[0].isfinite().all() and expected[0].std() > 0.1
    with runtime.load(checkpoint, overrides=overrides) as engine:
        found = _logits(engine, ids)
        assert all(map(torch.equal, found, expected))
        engine.check_integrity()
        cache = engine.stats().cache
        assert cache.num_prefetch_used >= LAYERS * (1 if slots == 1 else min(EXPERTS, engine.num_slots) // 2)


@pytest.mark.usefixtures("late")
def test_the_kernel_of_the_cpu_is_replaced_and_said(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        assert engine.profile.compute.decode == "eager"
        assert any("gemv is for the CPU" in note for note in engine.notes)


def test_tensors_of_a_slab_start_where_a_gpu_wants_them(checkpoint: Path) -> None:
    loaded = load_offloaded(str(checkpoint), dtype=torch.float32)  # has to be converted
    store = ExpertStore.open(loaded.model, loaded.files, loaded.layers)
    slab = HostSlab(store)
    resident = dict(load_resident(str(checkpoint), dtype=torch.float32).model.named_parameters())
    for expert in store.experts:
        layer, index = divmod(expert, store.num_experts)
        for place in slab.tensors(expert):
            assert place.slot_offset % ALIGNMENT_BYTES == 0
            view = slab.arena.view(slab.start(expert) // slab.slot_bytes, place)
            assert torch.equal(view, resident[f"{store.prefixes[layer]}.{place.name}"][index])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_one_line(checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device '{device}': this torch \(.*\) sees no GPU"):
        runtime.load(checkpoint, device=device)
    tuned = Profile.default().model_copy(update={"match": Match(device="cuda:NVIDIA H200")})
    for where in (None, "cpu"):
        with pytest.raises(ProfileError, match="device: profile cuda:NVIDIA H200, here cpu"):
            runtime.load(tuned, checkpoint, device=where, strict=True)
        with runtime.load(tuned, checkpoint, device=where) as engine:
            assert engine.model.device.type == "cpu"
            assert any("the default configuration runs instead" in note for note in engine.notes)


def test_a_profile_of_a_gpu_is_matched_with_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(loading, "find_device", lambda name, profile: gpu)
    monkeypatch.setattr(devices, "_name", lambda device: "cuda:NVIDIA H200")
    monkeypatch.setattr(loading, "gpu_number", lambda device: 3)
    properties = SimpleNamespace(total_memory=140 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    match = {"match.device": "cuda:NVIDIA H200", "match.memory_total_bytes": 141 << 30}
    tuned = Profile.default().with_overrides(match)
    found = loading.choose(tuned, checkpoint)
    assert found.device == gpu and found.match is not None and found.match.level == "compatible"
    assert found.match.reasons == ("the profile does not say which model it is for",)
    assert devices.device_facts(gpu).versions == machine_facts().versions
    probed: list[tuple[int, torch.device, float]] = []

    def probe(expert_bytes: int, device: torch.device, *, budget_s: float) -> float:
        probed.append((expert_bytes, device, budget_s))
        return 40e9

    monkeypatch.setattr(loading, "gpu_bandwidth", probe)
    faster = tuned.with_overrides({"match.bandwidth_at_expert_size_bytes_per_s": {"min": 50e9}})
    found = loading.choose(faster, checkpoint, probe=0.5)
    assert found.match is not None and found.match.level == "stale"
    assert "bandwidth at expert size: profile at least 50.0 GB/s, here 40.0 GB/s" in found.match.reasons[-1]
    assert probed == [(found.facts.expert_bytes, gpu, 0.5)]
    with pytest.raises(ProfileError, match=r"is stale here .*; tune one: python -m harness.tune --model .* --gpu 3$"):
        loading.choose(faster, checkpoint, probe=True, strict=True)


@pytest.mark.usefixtures("late")
def test_fewer_slots_are_used_and_the_device_keeps_their_bytes(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _tokens(reference)
    with runtime.load(checkpoint, overrides={"cache.slots": 12, "prefetch.depth": 0}) as engine:
        assert _tokens(engine) == expected
        num_bytes = engine.stats().num_bytes
        assert engine.shrink(5) == 0 and engine.num_slots == 5
        assert engine.stats().num_bytes == num_bytes, "moved on the device, and not brought in again"
        assert engine.notes[-1] == "5 expert slots are used instead of 12, but the device keeps their bytes reserved"
        assert _tokens(engine) == expected
        engine.grow()
        assert engine.num_slots == 12 and _tokens(engine) == expected
        engine.check_integrity()
        assert engine.pressure is None, "the host's memory is not what these slots are in"
        with pytest.raises(UsageError, match="expert slots of a GPU do not count"):
            engine.set_memory_limit(8 << 30)
        assert engine.pressure is None


@pytest.mark.usefixtures("late")
def test_a_copy_that_fails_after_it_was_waited_for_ends_the_pass(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _tokens(reference)
    with runtime.load(checkpoint, overrides={"cache.slots": TOP_K}) as engine:
        (pool,) = engine._pools
        for _ in range(2):
            assert _tokens(engine) == expected
            with monkeypatch.context() as lost:
                lost.setattr(LateStreams, "is_done", _lost)
                with pytest.raises(TransferError, match="CUDA error: lost; what was computed with it may be wrong"):
                    _tokens(engine)
            engine.check_integrity()
            residency, transfer = pool.coordinator.residency, pool.coordinator.transfer
            assert not any(transfer.has_failed(expert) for expert in residency.resident())
        assert _tokens(engine) == expected
        assert engine.transfer_stats()[0].num_failed_loads > 0


def _lost(streams: LateStreams, event: list[int]) -> bool:
    raise RuntimeError("CUDA error: lost")


@pytest.mark.parametrize("device", ["meta", "gpu", "mps"])
def test_a_device_that_nothing_runs_on(checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device '{device}' is not one that this runs on"):
        runtime.load(checkpoint, device=device)


class TimedStreams(LateStreams):
    """Copies take the time that a link of `BYTES_PER_S` would, once they are waited for."""

    BYTES_PER_S = 10e9
    copied: ClassVar[list[int]] = []
    now_s: ClassVar[float] = 0.0

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        super().copy(lane, expert, slot, start, num_bytes)
        TimedStreams.copied.append(num_bytes)

    def wait(self, event: list[int], lane: Lane) -> None: ...

    def synchronize(self, event: list[int]) -> None:
        waiting = sum(one is not None for one in self._pending[: event[0]])
        super().synchronize(event)
        TimedStreams.now_s += waiting * self.num_bytes / self.BYTES_PER_S


@pytest.mark.parametrize("expert_bytes", [100_000, 12 << 20, 200 << 20])
def test_the_bandwidth_to_a_gpu_is_that_of_whole_experts(expert_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedStreams, "copied", [])
    found = gpu_bandwidth(
        expert_bytes, devices.CPU, budget_s=0.1, streams=TimedStreams, clock=lambda: TimedStreams.now_s
    )
    assert found == pytest.approx(TimedStreams.BYTES_PER_S)
    assert set(TimedStreams.copied) == {expert_bytes}
    assert len(TimedStreams.copied) >= 0.1 * TimedStreams.BYTES_PER_S / expert_bytes
