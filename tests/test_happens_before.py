"""Every wait that the way to a GPU relies on, left out: that is seen, whether or not a number came out wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from tiny import save_tiny

import runtime
from runtime import build
from runtime import engine as engines
from runtime.cache.miss import MissRates
from runtime.cuda_driver import CudaDriver
from runtime.engine import Engine
from runtime.errors import TransferError
from runtime.readback import CudaUploader
from runtime.transfer.cuda import CudaTransfer, Lane
from runtime.transfer.cuda_streams import CudaStreams
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_rows import HostRows
from runtime.transfer.host_slab import HostSlab
from runtime.transfer.reader import FileReader
from runtime.transfer.tiered import TieredTransfer
from runtime.vocabulary import Load, LoadReason

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")

GPU = torch.device("cuda", 0)
ROWS = {"cache.slots": 4, "prefetch.depth": 0, "tiers.host_bytes": 5 * 8192}
PREFETCH = {"predictor.kind": "gate_lookahead", "prefetch.depth": 2, "prefetch.on_trial": False}
COMPUTE = {"miss": "compute", "numerics": "equivalent", **ROWS, "cache.slots": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda.installed() as installed:
        yield installed


# What an engine goes through


@torch.inference_mode()
def compute(engine: Engine, *, elsewhere: bool = False) -> None:
    """A prompt and tokens after it; `elsewhere`: on a stream of its own."""
    model: Any = engine.model
    with torch.cuda.stream(torch.cuda.Stream(GPU)) if elsewhere else nullcontext():
        out = model(torch.arange(1, 13, device=GPU)[None], use_cache=True)
        for token in range(2):
            out = model(torch.tensor([[token]], device=GPU), past_key_values=out.past_key_values, use_cache=True)


def replay(engine: Engine) -> None:
    compute(engine, elsewhere=True)
    assert engine.needed_loads
    engine.replay_loads(engine.needed_loads[:10])
    compute(engine, elsewhere=True)


def shrink(engine: Engine) -> None:
    compute(engine, elsewhere=True)
    engine.shrink(5)
    compute(engine, elsewhere=True)


def change_streams(engine: Engine) -> None:
    compute(engine)
    compute(engine, elsewhere=True)


def fail(engine: Engine, refused: int = 5) -> None:
    """A copy is refused while others are under way."""
    upload, num_left = CudaDriver.upload, refused

    def refuse(*args: Any) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise RuntimeError("CUDA error: refused")
        upload(*args)

    compute(engine)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TransferError, match="refused"):
        patch.setattr(CudaUploader, "__call__", lambda own, values: values.to(own._device))
        patch.setattr(CudaDriver, "upload", refuse)
        compute(engine)
    compute(engine)


def fail_in_part(engine: Engine) -> None:
    """A copy is refused of which the first half is under way."""
    spans = HostRows.spans

    def halves(own: HostRows, expert: int, start: int, num_bytes: int) -> list[Any]:
        middle = num_bytes // 2
        return [*spans(own, expert, start, middle), *spans(own, expert, start + middle, num_bytes - middle)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostRows, "spans", halves)
        fail(engine, 6)


def read_slowly(engine: Engine) -> None:
    read = FileReader.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileReader, "read", lambda *args: time.sleep(0.002) or read(*args))
        compute(engine)


# What is left out

Break = Callable[[pytest.MonkeyPatch], None]


def nothing(owner: Any, *names: str) -> Break:
    """These methods do nothing."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        for name in names:
            patch.setattr(owner, name, lambda *args: None)

    return leave_out


def unordered(*lanes: Lane) -> Break:
    """The streams of these lanes wait for no event."""
    wait = CudaStreams.wait

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(CudaStreams, "wait", lambda own, event, lane: None if lane in lanes else wait(own, event, lane))

    return leave_out


def short_leases(patch: pytest.MonkeyPatch) -> None:
    """A row is free as soon as the copy out of it is enqueued."""

    def end_copies(own: TieredTransfer) -> None:
        for climb in list(own._climbs.values()):
            if climb.copy is not None:
                own._end(climb, "")
                own._residency.release([climb.expert])

    patch.setattr(TieredTransfer, "_end_copies", end_copies)


def early_copies(patch: pytest.MonkeyPatch) -> None:
    """Rows are copied from while they are read into."""

    def end_reads(own: TieredTransfer) -> None:
        for expert in list(own._reads):
            del own._reads[expert]
            own._residency.complete([expert])

    patch.setattr(TieredTransfer, "_end_reads", end_reads)


def early_copies_unpinned(patch: pytest.MonkeyPatch) -> None:
    early_copies(patch)
    fake_cuda._cuda.pin_limit_bytes = 0


def loose_rows(patch: pytest.MonkeyPatch) -> None:
    """An expert that will be computed on the host is looked for where it was, and others may take its row."""
    rows: dict[int, int] = {}

    def hold(own: HostRows, experts: Any) -> None:
        rows.update((expert, own.residency.slot_of(expert)) for expert in experts)

    def weights(own: HostRows, expert: int) -> Any:
        row = rows.get(expert, own.residency.slot_of(expert))
        return {place.name: own.arena.view(row, place) for place in own.store.tensors(expert)}

    patch.setattr(HostRows, "hold", hold)
    patch.setattr(HostRows, "release", lambda own, experts: None)
    patch.setattr(HostRows, "weights", weights)


def unrecovered(patch: pytest.MonkeyPatch) -> None:
    """A pass that was broken off leaves its copies under way."""
    nothing(CudaTransfer, "recover", "land")(patch)
    patch.setattr(TieredTransfer, "drain", lambda own: own._climbs.clear())


class LeftOut(NamedTuple):
    """`race`: what is said of it."""

    leave_out: Break
    overrides: dict[str, Any]
    go_through: Callable[[Engine], None]
    race: str


READ_EARLY = "(a copy reads.* while reading a file writes|reading a file writes.* while a copy reads)"
MOST_TRIES = 12
REREAD = "(reading a file writes.* while a copy reads|a copy reads.* while reading a file writes)"
OVERWRITTEN = "a copy writes.* while (linear|_grouped_mm)[.a-z]* reads"
COMPUTED_EARLY = "(linear|_grouped_mm)[.a-z]* reads.* while a copy writes"
HOST_ROW = "(reading a file writes.* while the host's kernel reads|the host's kernel reads.* while reading a file)"
LEFT_OUT = {
    "the gate of demand": LeftOut(unordered(Lane.DEMAND), {"cache.slots": 4}, compute, OVERWRITTEN),
    "the gate of prefetches": LeftOut(unordered(Lane.PREFETCH), {"cache.slots": 3, **PREFETCH}, compute, OVERWRITTEN),
    "the wait before computing": LeftOut(unordered(Lane.COMPUTE), {"cache.slots": 4}, compute, COMPUTED_EARLY),
    "the lease of a row until its copy has landed": LeftOut(short_leases, ROWS, compute, REREAD),
    "the end of reading a row": LeftOut(early_copies, ROWS, compute, READ_EARLY),
    "the end of reading a pageable row": LeftOut(early_copies_unpinned, ROWS, compute, READ_EARLY),
    "the hold of a row that is computed from": LeftOut(loose_rows, COMPUTE, read_slowly, HOST_ROW),
    "the end of what a broken pass began": LeftOut(unrecovered, ROWS, fail, REREAD),
    "the end of what was refused in part": LeftOut(
        nothing(CudaTransfer, "_finish_copies"), {**ROWS, "tiers.host_bytes": 2 * 8192}, fail_in_part, REREAD
    ),
    "the wait for what is read back": LeftOut(
        nothing(CudaDriver, "wait"), {}, compute, "memmove reads.* while a copy writes"
    ),
    "the end of passes before a replay": LeftOut(nothing(engines, "finish"), {}, replay, OVERWRITTEN),
    "the end of a replay": LeftOut(nothing(CudaTransfer, "drain"), {}, replay, COMPUTED_EARLY),
    "the end of passes before slots move, and of that": LeftOut(
        nothing(DeviceSlots, "_synchronize"), {"cache.slots": 9}, shrink, "reads.* while copy_ writes"
    ),
    "the turn of streams": LeftOut(
        lambda patch: patch.setattr(build, "in_turn", lambda device: lambda passing: None),
        {"cache.slots": 4},
        change_streams,
        OVERWRITTEN,
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_engine_races_without(checkpoint: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    leave_out, overrides, go_through, race = LEFT_OUT[name]
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: MissRates(1.0, 1.0, 0.0))
    with runtime.load(checkpoint, device=GPU, overrides=overrides, record_loads=True) as engine:
        go_through(engine)
    assert not cuda.order.races
    leave_out(monkeypatch)
    for _ in range(MOST_TRIES):  # threads that read may do so early enough for nothing to be amiss
        loaded = runtime.load(checkpoint, device=GPU, overrides=overrides, record_loads=True)
        with loaded as engine, suppress(Exception):  # what is computed may be anything
            go_through(engine)
        if any(re.search(race, found) for found in cuda.order.races):
            break
    else:
        raise AssertionError(cuda.order.races)
    cuda.order.clear()


def copy_twice(transfer: CudaTransfer) -> None:
    """Into one slot, by either stream, and no further."""
    transfer.submit([Load(0, 0, LoadReason.PREFETCH)])
    transfer.submit([Load(1, 0, LoadReason.DEMAND)])
    transfer.close()


def forget_the_copy_before(patch: pytest.MonkeyPatch) -> None:
    enqueue = CudaTransfer._enqueue
    patch.setattr(CudaTransfer, "_enqueue", lambda own, load, pieces, after: enqueue(own, load, pieces, ()))


def close_at_once(patch: pytest.MonkeyPatch) -> None:
    nothing(CudaTransfer, "drain")(patch)
    nothing(fake_cuda.Stream, "synchronize")(patch)


@pytest.mark.parametrize(
    ("leave_out", "race"),
    [
        (forget_the_copy_before, "a copy writes.* while a copy writes"),
        (close_at_once, "giving memory back writes.* while a copy reads"),
    ],
)
def test_copies_race_without(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, leave_out: Break, race: str) -> None:
    for is_whole in (True, False):
        if not is_whole:
            leave_out(monkeypatch)
        slab = HostSlab.blank(2, 8192)
        copy_twice(CudaTransfer(CudaStreams(slab, DeviceSlots(1, 8192, GPU)), 1, piece_bytes=4096, window_bytes=4096))
        if is_whole:
            assert not cuda.order.races
    assert any(re.search(race, found) for found in cuda.order.races), cuda.order.races
    cuda.order.clear()


@pytest.mark.parametrize("method", ["record", "synchronize"])
def test_halves_that_are_sent_from_race_without(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def send() -> None:
        sender = CudaUploader(GPU, half_bytes=1 << 12)
        for number in range(5):
            sender(torch.full((512,), number))
        torch.cuda.synchronize(GPU)

    send()
    assert not cuda.order.races
    nothing(fake_cuda.Event, method)(monkeypatch)
    send()
    assert any(re.search("memmove writes.* while a copy reads", race) for race in cuda.order.races), cuda.order.races
    cuda.order.clear()
