"""Whole engines under random combinations of options: whatever streams, is computed in place, comes from disk, is
prefetched, breaks off or shrinks in between, the logits are those of the resident model and nothing is left behind.

The way of a GPU, on streams that this machine can run, and then on a driver that is none, which tells of accesses that
nothing orders. Every engine and all that happens to it follow from a seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from interrupts import interrupted_at
from late_streams import LateStreams
from tiny import EXPERTS, VOCABULARY, save_tiny

import runtime
from runtime import build, build_tiers
from runtime.cache.miss import MissRates
from runtime.cache.policies import POLICIES
from runtime.engine import Engine
from runtime.errors import TransferError
from runtime.profile import LOSSY
from runtime.prompts import PromptRequest
from runtime.readback import HostReader
from runtime.schedulers.fifo import Fifo
from runtime.serving import run_batch
from runtime.transfer.cuda import Lane
from runtime.transfer.cuda_streams import CudaStreams
from runtime.transfer.host_rows import HostRows
from runtime.transfer.tiered import TieredTransfer

SEEDS, FAST, ON_DRIVER = 32, 12, 4  # the others are for `make test-all`
NUM_ACTIONS = 4
ROW_BYTES = 8192  # of the float32 checkpoint's experts, as files are read into them
TOLERANCE = 1e-4  # of the logits' spread, where float32 is rounded otherwise
INTERRUPTED = (
    "cache/coordinator.py",
    "experts.py",
    "pool.py",
    "transfer/cuda.py",
    "transfer/host_rows.py",
    "transfer/tiered.py",
)


class Drawn:
    """What a seed says: the options of an engine, the machine that it believes to run on, and what happens to it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.numerics = rng.choice(["exact", "exact", "equivalent", "equivalent", "lossy.substitute"])
        self.overrides: dict[str, Any] = {
            "numerics": self.numerics,
            "cache.slots": rng.choice([1, 2, 3, 5, 7, 9, 12, 17, 24]),
            "cache.policy": rng.choice(sorted(POLICIES)),
            "prefetch.depth": rng.randint(0, 2),
            "prefetch.count": rng.randint(1, 4),
            "prefetch.on_trial": False,
            "prefetch.adaptive": rng.random() < 0.3,
            "predictor.kind": rng.choice(["gate_lookahead", "gate_lookahead", "previous_token", "activation_matrix"]),
            "compute.prefill": rng.choice(["eager", "grouped_mm"]),
            "compute.decode": rng.choice(["eager", "grouped_mm"]),
            "transfer.streams": rng.randint(1, 2),
        }
        if self.numerics.startswith("lossy"):
            self.overrides["prefetch.depth"] = max(1, self.overrides["prefetch.depth"])
        if self.numerics == "equivalent":
            self.overrides["miss"] = rng.choice(["auto", "compute"])
            self.overrides["compute.host_share"] = rng.choice([None, None, 0.3, 1.0])
        if rng.random() < 0.6:
            self.overrides["tiers.host_bytes"] = rng.choice([2, 3, 5, 9, 16]) * ROW_BYTES
            self.overrides["tiers.host_policy"] = rng.choice(["lru", "next_use", "lfru", "td_next_use"])
        self.overrides = {key: value for key, value in self.overrides.items() if value is not None}
        self.rates = MissRates(1.0, rng.choice([0.2, 1.0, 3.0]), rng.choice([0.0, 0.05, 1.0]))
        self.waits = rng.random() < 0.5

    def ids(self) -> torch.Tensor:
        """A prompt, some long enough to stream."""
        length = self.rng.choice([1, 3, 20, 70, 150])
        batch = self.rng.choice([1, 1, 2])
        ids = [[self.rng.randrange(1, len(VOCABULARY)) for _ in range(length)] for _ in range(batch)]
        return torch.tensor(ids)

    def requests(self) -> list[PromptRequest]:
        """Two short ones, which are served together."""
        return [PromptRequest(str(i), tuple(self.ids()[0, :40].tolist()), self.rng.randint(1, 4)) for i in range(2)]


class MovingStreams(LateStreams):
    """Copies that end at any time between the earliest and the latest."""

    rng = random.Random()
    haste = 0.0

    def _move(self) -> None:
        if self.rng.random() < self.haste:
            self.synchronize([self.rng.randint(0, len(self._pending))])

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        super().copy(lane, expert, slot, start, num_bytes)
        self._move()

    def is_done(self, event: list[int]) -> bool:
        self._move()
        return super().is_done(event)


class WaitingReader(HostReader):
    """What predictors want to know is asked for ahead, as on a GPU."""

    waits = True


@dataclass(frozen=True)
class Models:
    """The checkpoint, its experts, and the resident model with each pair of kernels."""

    folder: Path
    weights: Mapping[str, torch.Tensor]
    references: Mapping[tuple[str, str], Engine]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)
    names = ("eager", "grouped_mm")
    kernels = [(prefill, decode) for prefill in names for decode in names]
    found = {
        pair: runtime.load_reference(folder, overrides={"compute.prefill": pair[0], "compute.decode": pair[1]})
        for pair in kernels
    }
    weights = dict(found["eager", "eager"].model.named_parameters())
    yield Models(folder, weights, found)
    for engine in found.values():
        engine.close()


@torch.inference_mode()
def logits_of(engine: Engine, ids: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """Of a prompt, and of steps that go on with it, fed its own tokens."""
    model: Any = engine.model
    output = model(ids, use_cache=True)
    found = [output.logits]
    for step in range(num_steps):
        output = model(ids[:, step % ids.shape[1]][:, None], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return found


class Life:
    """An engine and what happens to it.

    Attributes:
        streams: of its transfer. refused: what fails of them, or reading files. interrupted: where Ctrl-C comes.
    """

    streams: Any = MovingStreams
    refused = ("copy", "is_done", "read")
    interrupted = INTERRUPTED

    def __init__(self, drawn: Drawn, engine: Engine, models: Models) -> None:
        self.drawn, self.engine, self.rng = drawn, engine, drawn.rng
        self.reference = models.references[drawn.overrides["compute.prefill"], drawn.overrides["compute.decode"]]
        self.weights = models.weights
        (self.pool,) = engine._pools
        self.was_broken = False

    @property
    def actions(self) -> list[Callable[[], None]]:
        return [self.serve, self.resize, self.interrupt, self.interrupt, self.fail, self.fail]

    def ids(self) -> torch.Tensor:
        """A prompt, where the engine computes."""
        return self.drawn.ids().to(self.engine.model.device)

    def go_on(self) -> None:
        for action in self.rng.sample(self.actions, NUM_ACTIONS):
            for act in (action, self.run):
                print(act.__name__, file=sys.stderr)
                act()
                self.check()

    def run(self) -> None:
        """A prompt and a few steps, whose logits must be the resident model's."""
        ids, num_steps = self.ids(), self.rng.randint(0, 6)
        expected = logits_of(self.reference, ids.cpu(), num_steps)
        found = logits_of(self.engine, ids, num_steps)
        if self.drawn.numerics in LOSSY:
            expected = expected[: 1 if ids.shape[1] > 1 else 0]  # prompts are exact
        assert all(one.isfinite().all() for one in found)
        for one, other in zip((one.cpu() for one in found), expected, strict=False):
            if self.drawn.numerics == "equivalent" or ids.is_cuda:
                assert (one - other).abs().max() <= TOLERANCE * other.std()
            else:
                assert torch.equal(one, other)

    def serve(self) -> None:
        """Some requests together."""
        requests = self.drawn.requests()
        result = run_batch(self.engine, requests, Fifo(2))
        assert len(result.requests) == len(requests)
        if self.drawn.numerics == "exact":
            expected = run_batch(self.reference, requests, Fifo(2))
            assert [one.token_ids for one in result.requests] == [one.token_ids for one in expected.requests]

    def resize(self) -> None:
        most = self.drawn.overrides["cache.slots"]
        if self.engine.num_slots > 1 and self.rng.random() < 0.7:
            self.engine.shrink(self.rng.randint(1, self.engine.num_slots))
        else:
            self.engine.grow(self.rng.randint(self.engine.num_slots, most))

    def interrupt(self) -> None:
        """A pass that Ctrl-C breaks off, in any line of what serves it."""
        ids, line = self.ids(), self.rng.randint(1, self.rng.choice([300, 5000]))
        with interrupted_at(line, self.interrupted):
            logits_of(self.engine, ids, 2)
        self.was_broken = True

    def fail(self) -> None:
        """A pass in which the device or the disk refuses something, sooner or later."""
        left = self.rng.randint(1, 20)

        def refuse(*_: Any) -> Any:
            nonlocal left
            left -= 1
            return left < 0

        transfer, ids = self.pool.coordinator.transfer, self.ids()
        with pytest.MonkeyPatch.context() as broken:
            what = self.rng.choice(self.refused)
            if what != "read":
                original = getattr(self.streams, what)

                def lost(*args: Any) -> Any:
                    if refuse():
                        raise RuntimeError("CUDA error: lost")
                    return original(*args)

                broken.setattr(self.streams, what, lost)
            elif isinstance(transfer, TieredTransfer):
                files = transfer._disk._reader._files
                read = files._read

                def unreadable(*args: Any) -> int:
                    if refuse():
                        raise OSError(5, "Input/output error")
                    return read(*args)

                broken.setattr(files, "_read", unreadable)
                broken.setattr(files, "_sleep", lambda pause_s: None)
            with suppress(TransferError):
                logits_of(self.engine, ids, 3)
        self.was_broken = True
        with suppress(TransferError):  # of a copy that was waited for, told by the next pass
            logits_of(self.engine, ids[:, :1], 0)

    def check(self) -> None:
        """Nothing is left behind, every slot holds what it is said to hold, and the counters add up."""
        pool, coordinator = self.pool, self.pool.coordinator
        residency = coordinator.residency
        self.engine.check_integrity()
        assert not residency._leases.any(), "a lease is left"
        if self.rng.random() < 0.5:
            return  # what is under way stays so
        coordinator.settle()
        self.engine.check_integrity()
        for expert in residency.resident():
            layer, index = divmod(expert, EXPERTS)
            assert residency.is_ready(expert)
            for name, weight in pool.weights(expert).items():
                own = self.weights[f"model.layers.{layer}.mlp.experts.{name}"][index]
                assert torch.equal(weight.cpu(), own), f"slot {residency.slot_of(expert)} does not hold expert {expert}"
        if isinstance(pool.store, HostRows):
            pool.store.residency.check_integrity()
            assert not pool.store.residency._leases.any(), "a row is held or leased by nobody"
        self._count()

    def _count(self) -> None:
        cache, moved = self.engine.stats().cache, self.engine.transfer_stats()[0]
        assert cache.num_lookups == cache.num_hits + cache.num_in_flight + cache.num_misses
        assert cache.num_prefetch_used + cache.num_prefetch_wasted <= cache.num_prefetch_issued
        assert cache.num_computed <= cache.num_misses
        if not self.was_broken:
            planned = cache.num_misses - cache.num_computed + cache.num_prefetch_issued
            assert moved.num_loads + moved.num_cancelled == planned


@pytest.mark.parametrize(
    "seed", [*range(FAST), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FAST, SEEDS))]
)
def test_whatever_is_combined_and_whatever_happens(seed: int, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(seed)
    monkeypatch.setattr(build_tiers, "CudaStreams", MovingStreams)
    monkeypatch.setattr(build, "is_gpu", lambda device: True)
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: drawn.rates)
    monkeypatch.setattr(build, "reader_for", lambda device: WaitingReader() if drawn.waits else HostReader())
    monkeypatch.setattr(MovingStreams, "rng", drawn.rng)
    monkeypatch.setattr(MovingStreams, "haste", drawn.rng.choice([0.0, 0.1, 1.0]))
    with runtime.load(models.folder, overrides=drawn.overrides) as engine:
        Life(drawn, engine, models).go_on()


class LifeOnDriver(Life):
    """The same through torch's streams and the driver's copies, in turn on streams of their own."""

    streams = CudaStreams
    refused = (*Life.refused, "record", "wait")
    interrupted = (*INTERRUPTED, "transfer/cuda_streams.py", "cuda_driver.py", "readback.py")

    @property
    def actions(self) -> list[Callable[[], None]]:
        return [*super().actions, self.replay, self.replay]

    def run(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if self.rng.random() < 0.5 else nullcontext():
            super().run()

    def replay(self) -> None:
        """Loads that were needed, without compute."""
        needed = self.engine.needed_loads
        self.engine.replay_loads((needed or [])[-20:])
        self.was_broken = True  # for the counters


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")
@pytest.mark.parametrize(
    "seed", [*range(ON_DRIVER), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(ON_DRIVER, SEEDS))]
)
def test_whatever_happens_is_ordered(seed: int, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(seed)
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: drawn.rates)
    with fake_cuda.installed() as cuda:
        cuda.rng, cuda.haste = drawn.rng, drawn.rng.choice([0.0, 0.1, 1.0])
        cuda.pin_limit_bytes = drawn.rng.choice([1 << 60, 1 << 60, 3 * ROW_BYTES, 0])
        gpu = torch.device("cuda", 0)
        with runtime.load(models.folder, device=gpu, overrides=drawn.overrides, record_loads=True) as engine:
            LifeOnDriver(drawn, engine, models).go_on()
