"""What calls CUDA, on a driver that is none: `fake_cuda`. Whole engines, and what they are told when it refuses."""

from __future__ import annotations

import contextlib
import re
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from interrupts import interrupted_at
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import build, devices, host_memory, numa, readback
from runtime.cache.miss import MissRates
from runtime.cuda_driver import CudaDriver
from runtime.errors import DeviceError, ExpertFlowError, TransferError
from runtime.probe import gpu_bandwidth
from runtime.profile import Profile
from runtime.prompts import PromptRequest
from runtime.readback import CudaReader, CudaUploader, upload
from runtime.serving import run_batch
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.cuda_streams import CudaStreams, pins_beyond_limit
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab
from runtime.vocabulary import Load, LoadReason

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")

GPU = torch.device("cuda", 0)
ROW_BYTES, NUM_EXPERTS = 8192, LAYERS * EXPERTS
SOME = {"tiers.host_bytes": NUM_EXPERTS // 3 * ROW_BYTES}
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda.installed() as installed:
        yield installed


@pytest.fixture
def two() -> Iterator[FakeCuda]:
    with fake_cuda.installed(2) as installed:
        yield installed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def logits_of(engine: runtime.Engine, cuda: FakeCuda) -> list[torch.Tensor]:
    """Of a prompt, of tokens after it, of a batch; nothing but the one read per layer may have made the host wait."""
    device = engine.model.device
    ids = engine.tokenizer(TEXT, return_tensors="pt")["input_ids"].to(device)
    model: Any = engine.model
    before, waits = cuda.num_syncs, cuda.calls["cuStreamSynchronize"]
    out = model(ids[:, :-4], use_cache=True)
    found = [out.logits[:, -1]]
    for place in range(4):
        step = ids[:, ids.shape[1] - 4 + place :][:, :1]
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    found.append(model(ids.repeat(3, 1), use_cache=False).logits[:, -1])
    assert cuda.num_syncs == before
    assert cuda.calls["cuStreamSynchronize"] - waits == LAYERS * 6
    return [one.cpu() for one in found]


SETTINGS: dict[str, dict[str, Any]] = {
    "one slot": {"cache.slots": 1},
    "few": {"cache.slots": TOP_K},
    "a quarter": {"cache.slots": "25%", "compute.decode": "grouped_mm", "compute.prefill": "eager"},
    "one stream": {"cache.slots": "25%", "transfer.streams": 1},
    "prefetch": {"cache.slots": 10, "predictor.kind": "gate_lookahead", "prefetch.depth": 2},
    "all": {},
    "disk": {"cache.slots": 4, **SOME},
    "disk, prefetch": {"cache.slots": 6, "predictor.kind": "gate_lookahead", "prefetch.depth": 1, **SOME},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_engine_equals_the_resident_model(checkpoint: Path, cuda: FakeCuda, name: str) -> None:
    overrides = SETTINGS[name]
    with runtime.load_reference(checkpoint, device=GPU, overrides=overrides) as reference:
        expected = logits_of(reference, cuda)
    assert all(one.isfinite().all() for one in expected)
    with runtime.load(checkpoint, device=GPU, overrides=overrides) as engine:
        assert sum(cuda.registered.values()) > 0
        found = logits_of(engine, cuda)
        assert all(map(torch.equal, found, expected))
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_loads > 0 and stats.peak_gpu_bytes > 0
        assert cuda.num_pageable == 0 and stats.num_failed_loads == 0
    assert not cuda.registered


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_groups_that_torch_has_no_kernel_for(checkpoint: Path, cuda: FakeCuda, dtype: torch.dtype) -> None:
    overrides = {"cache.slots": TOP_K, "compute.decode": "grouped_mm"}
    with runtime.load_reference(checkpoint, device=GPU, dtype=dtype, overrides=overrides) as reference:
        expected = logits_of(reference, cuda)
    with runtime.load(checkpoint, device=GPU, dtype=dtype, overrides=overrides) as engine:
        assert all(map(torch.equal, logits_of(engine, cuda), expected))


def test_the_fake_notices_a_wait_that_is_left_out(
    checkpoint: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = CudaStreams.wait
    monkeypatch.setattr(CudaStreams, "wait", lambda own, event, lane: lane or wait(own, event, lane))
    overrides = {"cache.slots": TOP_K, "prefetch.depth": 0}
    with runtime.load(checkpoint, device=GPU, overrides=overrides) as engine:
        assert not all(one.isfinite().all() for one in logits_of(engine, cuda))
    assert cuda.order.races
    cuda.order.clear()


@pytest.mark.parametrize("overrides", [{}, SOME, {"numerics": "lossy.substitute"}])
def test_a_second_gpu_while_the_first_is_current(
    checkpoint: Path, two: FakeCuda, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, overrides = torch.device("cuda", 1), {"cache.slots": 6, **overrides}
    with runtime.load_reference(checkpoint, device=device, overrides=overrides) as reference:
        expected = logits_of(reference, two)
    with runtime.load(checkpoint, device=device, overrides=overrides) as engine:
        found = logits_of(engine, two)
        assert all(one.isfinite().all() for one in found)
        if "numerics" not in overrides:
            assert all(map(torch.equal, found, expected))
        assert two.device == 0 and not two.allocated[0]
    assert not two.registered


@pytest.mark.parametrize("more", [{}, SOME])
def test_misses_that_are_computed_on_the_host(
    checkpoint: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    overrides = {"cache.slots": TOP_K, "miss": "compute", "numerics": "equivalent", "prefetch.depth": 0, **more}
    with runtime.load_reference(checkpoint, device=GPU, dtype=torch.float32) as reference:
        expected = logits_of(reference, cuda)
    with runtime.load(checkpoint, device=GPU, dtype=torch.float32, overrides=overrides):
        pass  # with rates that are measured: experts are copied and computed, whatever comes out
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: MissRates(1.0, 1.0, 0.0))
    with runtime.load(checkpoint, device=GPU, dtype=torch.float32, overrides=overrides) as engine:
        sent = cuda.calls["cuMemcpyHtoDAsync_v2"]
        found = logits_of(engine, cuda)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=0.0, atol=1e-4 * float(other.std()))
        assert engine.stats().cache.num_computed > 0 and cuda.num_pageable == 0
        assert cuda.calls["cuMemcpyHtoDAsync_v2"] > sent
    assert not cuda.registered


def in_thread(call: Callable[[], Any]) -> Any:
    """What it returns or raises in a thread that has not used CUDA."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=120)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_any_thread_may_call_the_driver(num_devices: int) -> None:
    for index in range(num_devices):
        with fake_cuda.installed(num_devices) as cuda:
            device = torch.device("cuda", index)
            driver, there = CudaDriver(device), torch.arange(1000).to(device)
            here, back = driver.pinned(8000), driver.pinned(8000)
            here.fill_(7)

            def copy(
                driver: CudaDriver = driver, there: int = there.data_ptr(), here: torch.Tensor = here, to=back
            ) -> bool:
                driver.upload(there, here.data_ptr(), 8000, 0)
                driver.download(to.data_ptr(), there, 8000)
                driver.wait()
                return bool((to == 7).all())

            assert in_thread(copy)
            in_thread(driver.wait)
            assert cuda.device == 0


def made(cuda: FakeCuda, num_experts: int = 8, num_bytes: int = 5000) -> tuple[CudaTransfer, HostSlab, DeviceSlots]:
    """A transfer of two pieces per expert into four slots; expert `i` is bytes `i + 1`."""
    slab = HostSlab.blank(num_experts, num_bytes)
    for expert in range(num_experts):
        slab.arena.buffer(expert)[:num_bytes] = bytes([expert + 1]) * num_bytes
    slots = DeviceSlots(4, slab.slot_bytes, GPU)
    return CudaTransfer(CudaStreams(slab, slots), 4, piece_bytes=num_bytes // 2), slab, slots


def holds(slots: DeviceSlots, slot: int, expert: int, num_bytes: int = 5000) -> bool:
    return bool((slots.memory[slot * slots.slot_bytes :][:num_bytes].cpu() == expert + 1).all())


def test_another_thread_may_count_and_close_while_copies_are_under_way(cuda: FakeCuda) -> None:
    transfer, _, slots = made(cuda)
    transfer.submit([Load(0, 0, LoadReason.DEMAND), Load(1, 1, LoadReason.PREFETCH)])
    assert in_thread(transfer.stats).num_loads == 0  # nothing has been waited for
    assert in_thread(lambda: transfer.wait_any([0])) == [0]
    assert holds(slots, 0, 0)
    transfer.submit([Load(2, 2, LoadReason.PREFETCH), Load(3, 0, LoadReason.DEMAND)])
    in_thread(transfer.drain)
    stats = in_thread(transfer.stats)
    assert stats.num_failed_loads == 0 and stats.num_loads >= 3 and stats.busy_s > 0
    assert holds(slots, 0, 3)
    in_thread(transfer.close)
    assert not cuda.registered


def test_no_call_takes_memory_of_another_gpu(checkpoint: Path, two: FakeCuda) -> None:
    """Of which a context takes hundreds of megabytes, and where nothing is free there is an error instead."""
    overrides = {"predictor.kind": "gate_lookahead", "prefetch.depth": 1, "cache.slots": 6}
    with runtime.load(checkpoint, device=torch.device("cuda", 1), overrides=overrides) as engine:
        logits_of(engine, two)
        transfer = engine._pools[0].coordinator.transfer
        transfer.submit([Load(0, 0, LoadReason.PREFETCH)])
        assert in_thread(engine.stats).num_loads > 0
        in_thread(transfer.drain)
    assert two.contexts == {1}


def test_an_engine_runs_and_closes_in_threads_of_its_own(checkpoint: Path, cuda: FakeCuda) -> None:
    overrides = {"cache.slots": 4, "predictor.kind": "gate_lookahead", "prefetch.depth": 1}
    engine = runtime.load(checkpoint, device=GPU, overrides=overrides)
    first, again = logits_of(engine, cuda), in_thread(lambda: logits_of(engine, cuda))
    assert all(map(torch.equal, first, again))
    assert in_thread(engine.stats).num_loads > 0
    in_thread(engine.close)
    assert not cuda.registered


def test_what_the_driver_does_not_pin_stays_pageable(checkpoint: Path, cuda: FakeCuda) -> None:
    with runtime.load_reference(checkpoint, device=GPU) as reference:
        expected = logits_of(reference, cuda)
    for num_rows in (15, 9, 1, 0):
        cuda.pin_limit_bytes, before = num_rows * 4096, cuda.num_pageable
        with runtime.load(checkpoint, device=GPU, overrides={"cache.slots": 6}) as engine:
            assert sum(cuda.registered.values()) == num_rows * 4096
            assert all(map(torch.equal, logits_of(engine, cuda), expected))
            assert cuda.num_pageable > before
            (note,) = [note for note in engine.notes if "could be pinned" in note]
            assert "CUDA error 2 (error number 2)" in note and "tiers.host_bytes" in note
        assert not cuda.registered


def test_what_is_pinned_stays_out_of_forked_children(checkpoint: Path, cuda: FakeCuda) -> None:
    def leaves_out_children(address: int) -> bool:
        is_there = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                is_there = int(found[1], 16) <= address < int(found[2], 16)
            elif is_there and line.startswith("VmFlags:"):
                return "dc" in line.split()
        raise AssertionError(f"{address:x} is not mapped")

    for more in ({}, SOME):
        with runtime.load(checkpoint, device=GPU, overrides={"cache.slots": 4, **more}):
            assert leaves_out_children(min(cuda.registered))


@pytest.fixture
def memlock() -> Iterator[Callable[[int], None]]:
    """Sets what this process may lock, until the test has ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_MEMLOCK, (num_bytes, hard))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_a_kernel_does_not_hear_of_memory_that_was_not_pinned(cuda: FakeCuda) -> None:
    cuda.pin_limit_bytes = 0
    assert not pins_beyond_limit(GPU) and not cuda.registered
    cuda.pin_limit_bytes = 1 << 30
    assert pins_beyond_limit(GPU) and not cuda.registered
    assert cuda.calls["cuMemHostRegister_v2"] == 2
    assert torch.ones(3, device=GPU).tolist() == [1, 1, 1]


@pytest.mark.parametrize("limit_bytes", [1 << 16, 1 << 40])
def test_a_limit_of_any_size_is_tried_with_a_page(
    cuda: FakeCuda, memlock: Callable[[int], None], limit_bytes: int
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    memlock(limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard))
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert pins_beyond_limit(GPU)
    cuda.heeds_memlock = True
    assert not pins_beyond_limit(GPU)
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before and not cuda.registered


@pytest.mark.parametrize("heeds_memlock", [True, False])
def test_a_limit_that_the_driver_does_not_heed_does_not_count(
    checkpoint: Path,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    memlock: Callable[[int], None],
    heeds_memlock: bool,
) -> None:
    memlock(2 * 4096)
    monkeypatch.setattr(host_memory, "memlock_limit_bytes", lambda: 2 * 4096)  # who runs tests may lock what he likes
    cuda.heeds_memlock = heeds_memlock
    with runtime.load(checkpoint, device=GPU):
        assert sum(cuda.registered.values()) == (2 if heeds_memlock else NUM_EXPERTS) * 4096


def test_the_link_is_measured(cuda: FakeCuda) -> None:
    ticks = iter(range(1000))
    found = gpu_bandwidth(1 << 20, GPU, budget_s=5, clock=lambda: float(next(ticks)))
    assert found == pytest.approx(5 * 16 * (1 << 20) / 5, rel=0.3)
    assert cuda.calls["cuMemcpyHtoDAsync_v2"] >= 16 * 5 and not cuda.registered and not cuda.num_pageable


def test_what_is_asked_of_a_device(two: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("cuda", 1)
    torch.empty(1 << 20, dtype=torch.uint8, device=second)
    assert devices.peak_bytes(second) == 1 << 20 and devices.free_bytes(second) == fake_cuda.FREE_BYTES
    assert devices.device_facts(second).device == "cuda:Fake GPU"
    assert devices.find_device("cuda:1", Profile.default()) == second
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    for index in range(2):
        (tmp_path / fake_cuda.BUS_ID.format(index).lower()).mkdir()
        (tmp_path / fake_cuda.BUS_ID.format(index).lower() / "numa_node").write_text(f"{index + 3}\n")
    assert [numa.gpu_node(index) for index in range(3)] == [3, 4, None]


def test_sent_tensors_arrive_however_late(cuda: FakeCuda) -> None:
    send = CudaUploader(GPU, half_bytes=1 << 12)
    sizes = [1, 64, 65, 1000, 511, 0, 513, 5000, 3, 512] * 20
    sent = [torch.arange(size, dtype=torch.int64) + number for number, size in enumerate(sizes)]
    on_host = [one.clone() for one in sent]
    there = []
    for one in on_host:
        there.append(send(one))
        one.fill_(-1)  # it may be written again at once
    assert cuda.num_syncs == 0
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, sent, strict=True))
    wide = torch.arange(24.0).reshape(4, 6)
    for one in (wide.t(), wide[:, ::2].bfloat16(), wide > 3, torch.tensor(2.5)):
        assert torch.equal(upload(one, GPU).cpu(), one) and upload(one, GPU).dtype == one.dtype
    assert torch.equal(upload(wide.numpy(), GPU).cpu(), wide) and upload(wide, devices.CPU) is wide


def test_each_half_of_what_is_sent_is_on_one_stream(cuda: FakeCuda) -> None:
    send, streams = CudaUploader(GPU, half_bytes=1 << 12), [torch.cuda.Stream(GPU) for _ in range(3)]
    sent = []
    for number in range(60):
        stream = streams[number % 7 % 3]
        with torch.cuda.stream(stream):
            sent.append((stream, send(torch.full((200,), number))))
            if number % 5 == 4:
                assert sent[-1][1].tolist() == [number] * 200
    for number, (stream, there) in enumerate(sent):
        with torch.cuda.stream(stream):
            assert there.tolist() == [number] * 200


def test_threads_that_send_first_at_once_share_one_sender(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, used = threading.Barrier(2), list[CudaUploader]()

    class Slow(CudaUploader):
        def __init__(self, device: torch.device) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                begun.wait(timeout=0.5)  # for another one, if there can be
            super().__init__(device)

        def __call__(self, values: torch.Tensor) -> torch.Tensor:
            used.append(self)  # kept: its memory must not go while it is copied from
            return super().__call__(values)

    monkeypatch.setattr(readback, "CudaUploader", Slow)
    with ThreadPoolExecutor(2) as threads:
        for there in threads.map(lambda number: upload(torch.full((9,), number), GPU).tolist(), range(2)):
            assert len(set(there)) == 1
    assert len(used) == 2 and used[0] is used[1]


def test_an_interrupt_leaves_what_is_on_its_way_as_it_is(cuda: FakeCuda) -> None:
    line, has_come = 0, True
    while has_come:
        line += 1
        send, size = CudaUploader(GPU, half_bytes=1 << 12), (512,)
        sent = [send(torch.full(size, number)) for number in range(2)]  # both halves
        with interrupted_at(line, ["readback.py"]) as interrupt:
            send(torch.full(size, -1))
        has_come = interrupt.has_come
        send(torch.full(size, -2))
        assert [one.tolist() for one in sent] == [[0] * 512, [1] * 512]
    assert line > 5


def test_a_lost_gpu_ends_passes_with_errors_of_ours(checkpoint: Path, cuda: FakeCuda) -> None:
    engine = runtime.load(checkpoint, device=GPU, overrides={"cache.slots": 4})
    logits_of(engine, cuda)
    read = CudaReader(CudaDriver(GPU))
    there = torch.ones(3, device=GPU)
    cuda.lose()
    with pytest.raises(DeviceError, match=r"the GPU has failed \(CUDA error 700 \(error number 700\) in waiting for"):
        read([there])
    assert in_thread(engine.stats).num_loads > 0
    in_thread(engine.close)


@pytest.mark.parametrize("more", [{}, SOME])
@pytest.mark.parametrize("step", range(4))
def test_a_gpu_lost_within_a_pass_is_an_error_and_never_a_hang(
    checkpoint: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], step: int
) -> None:
    engine = runtime.load(checkpoint, device=GPU, overrides={"cache.slots": 3, "compute.prefill": "eager", **more})
    ids = torch.zeros((1, 5), dtype=torch.int64).to(GPU)
    transfer, steps = engine._pools[0].coordinator.transfer, iter(range(100))
    method = ("submit", "wait_any")[step % 2]
    call = getattr(transfer, method)

    def lost_then(*args: Any) -> Any:
        if next(steps) == step // 2 * 3:
            cuda.lose()
        return call(*args)

    monkeypatch.setattr(transfer, method, lost_then)
    errors = []
    for _ in range(3):
        with pytest.raises((ExpertFlowError, torch.AcceleratorError), match=r"CUDA error") as caught:
            in_thread(torch.inference_mode()(lambda: engine.model(ids)))
        errors.append(caught.value)
    assert isinstance(errors[0], TransferError)
    assert in_thread(engine.stats).num_failed_loads > 0
    in_thread(engine.close)


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"])
def test_one_refusal_fails_one_pass(checkpoint: Path, cuda: FakeCuda, name: str) -> None:
    with runtime.load(checkpoint, device=GPU, overrides={"cache.slots": 4}) as engine:
        first = logits_of(engine, cuda)
        cuda.failures[name] = [fake_cuda.OUT_OF_MEMORY]
        with pytest.raises(TransferError if "HtoD" in name else DeviceError, match="CUDA error 2"):
            logits_of(engine, cuda)
        engine.check_integrity()
        assert all(map(torch.equal, logits_of(engine, cuda), first))


def test_a_gpu_without_nvidias_driver(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DeviceError, match=r"cuda:0: NVIDIA's driver cannot be called \(libcuda.so.1: cannot open"),
    ):
        patch.setattr("ctypes.CDLL", no_library)
        CudaDriver(GPU)


def test_torch_has_what_the_fake_replaces() -> None:
    """By its own list of what is compiled: none of it can be called here."""
    stubs = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in fake_cuda.COMPILED:
        assert f"def {name}(" in stubs
    for name in fake_cuda.REPLACED:
        assert hasattr(torch.cuda, name), name


def test_slots_move_and_loads_are_replayed_on_the_device(checkpoint: Path, cuda: FakeCuda) -> None:
    overrides = {"cache.slots": 9, "predictor.kind": "gate_lookahead", "prefetch.depth": 1}
    with runtime.load(checkpoint, device=GPU, overrides=overrides, record_loads=True) as engine:
        expected = logits_of(engine, cuda)
        engine.shrink(5)
        assert all(map(torch.equal, logits_of(engine, cuda), expected))
        engine.grow(9)
        assert engine.needed_loads and engine.replay_loads(engine.needed_loads[:20]) > 0
        assert all(map(torch.equal, logits_of(engine, cuda), expected))
        engine.check_integrity()
        engine.start_trace(lookahead=1)
        ids = torch.arange(12, device=GPU)[None]
        with torch.inference_mode():
            engine.model(ids)
        trace = engine.trace()
        assert trace.token_ids is not None and trace.token_ids.tolist() == list(range(12))


def test_loads_are_replayed_beside_the_stream_that_passes_run_on(checkpoint: Path, cuda: FakeCuda) -> None:
    """After its last kernel, and before its next: every expert has a slot, so that the last pass waits for no load."""
    own, found = torch.cuda.Stream(GPU), list[torch.Tensor]()
    with runtime.load(checkpoint, device=GPU, overrides={"prefetch.depth": 0}, record_loads=True) as engine:
        with torch.cuda.stream(own):
            expected = logits_of(engine, cuda)
        (pool,) = engine._pools
        slots: Any = pool.arena
        held = slots.memory.inner.clone()
        own.queue.waiting.append(lambda: found.append(slots.memory.inner.clone()))  # a kernel that is late
        assert engine.needed_loads and engine.replay_loads(engine.needed_loads[:20]) > 0
        assert len(found) == 1 and torch.equal(found[0], held)
        with torch.cuda.stream(own):
            assert all(map(torch.equal, logits_of(engine, cuda), expected))


@pytest.mark.parametrize("more", [{}, SOME])
def test_a_batch_is_served_as_on_the_cpu(checkpoint: Path, more: dict[str, Any]) -> None:
    requests = [PromptRequest(str(number), tuple(range(3 + number, 9 + 2 * number)), 5) for number in range(3)]
    overrides = {"cache.slots": 6, "compute.decode": "eager"}
    with runtime.load(checkpoint, device="cpu", overrides=overrides) as engine:
        expected = run_batch(engine, requests, max_kv_tokens=512).requests
    with (
        fake_cuda.installed() as cuda,
        runtime.load(checkpoint, device=GPU, overrides={**overrides, **more}) as engine,
    ):
        found = run_batch(engine, requests, max_kv_tokens=512).requests
        assert sum(cuda.registered.values()) > 0 and engine.stats().num_loads > 0
    assert sorted((one.id, one.token_ids) for one in found) == sorted((one.id, one.token_ids) for one in expected)
