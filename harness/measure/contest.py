"""Start the contenders of a bench under their limits, find out what does not fit, and keep the rest running."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.measure import process as processes
from harness.measure.blocks import PROBE_TOKENS, Row, warm_up
from harness.measure.limits import Limit, ModelBytes, smallest_working
from harness.measure.pages import drop_pages
from harness.measure.process import ContenderFailed, Spec
from harness.measure.workload import TokenRequest

IMPLEMENTATIONS = ("eager", "grouped_mm")
MIN_SLOTS_STEP = 16


@dataclass(frozen=True)
class Contest:
    """What all contenders share.

    `num_pools` slots, one per shape of experts, are the fewest that our engine runs with; `context` is in tokens.
    `fused` is accelerate's copy of the checkpoint, `files` are those of both; accelerate may write to `scratch`; `say`
    shows progress.
    """

    model: str
    profile: str | None
    threads: int
    sizes: ModelBytes
    top_k: int
    num_pools: int
    context: int
    use_cgroup: bool
    warm_request: TokenRequest
    num_tokens: int
    cap_s: float
    fused: str
    files: tuple[Path, ...]
    scratch: Path
    say: Callable[[str], None]

    def engine_spec(self, slots: int, **overrides: Any) -> Spec:
        """Our engine with that many slots."""
        return Spec("engine", self.model, self.threads, self.profile, {**self._own, "cache.slots": slots, **overrides})

    def on_demand_spec(self) -> Spec:
        """Our engine without a cache: as many slots as one token's layer needs, so the next layer replaces them all."""
        nothing_kept = {"cache.policy": "lru", "prefetch.depth": 0, "predictor.kind": "none"}
        return self.engine_spec(self.top_k * self.num_pools, **nothing_kept)

    def lru_spec(self, slots: int, *, prefetches: bool) -> Spec:
        """Our engine with the cache that others have: the least recently used expert goes."""
        on_demand = {} if prefetches else {"prefetch.depth": 0, "predictor.kind": "none"}
        return self.engine_spec(slots, **{"cache.policy": "lru", **on_demand})

    def reference_spec(self) -> Spec:
        """The resident model through our kernels."""
        return Spec("reference", self.model, self.threads, self.profile, self._own)

    def resident_spec(self) -> Spec:
        """The resident model as transformers runs it."""
        return Spec("resident", self.model, self.threads)

    def accelerate_spec(self, kind: processes.Kind, implementation: str) -> Spec:
        """accelerate's disk offload of the fused copy."""
        folder = self.scratch / f"{kind}-{implementation}"
        return Spec(kind, self.fused, self.threads, implementation=implementation, folder=str(folder))

    @property
    def _own(self) -> dict[str, Any]:
        # A configuration is measured as it is, not while the engine finds out whether its prefetching pays.
        return {"compute.threads": self.threads, "workload.context": self.context, "prefetch.on_trial": False}

    def start(self, name: str, spec: Spec, limit_bytes: int | None) -> Any:
        """A context manager: the running process; see `process.start`."""
        return processes.start(name, spec, limit_bytes=limit_bytes, use_cgroup=self.use_cgroup)


def measure_process_bytes(contest: Contest) -> int:
    """What our process needs beside weights and slots: its peak with the fewest slots and the prompt, less both."""
    with contest.start("process", contest.engine_spec(contest.num_pools), None) as process:
        row = Row("ours", process)
        warm_up(row, contest.warm_request, PROBE_TOKENS, contest.cap_s)
        peak = process.peak_bytes or process.ask("facts", timeout_s=30.0)["peak_resident_bytes"]
    return int(peak) - contest.sizes.dense_bytes - contest.num_pools * contest.sizes.slot_bytes


class Field:
    """The contenders that run, each in a context of its own."""

    def __init__(self, contest: Contest, limit: Limit) -> None:
        self.rows: dict[str, Row] = {}
        self._contest, self._limit = contest, limit
        self._stacks: dict[str, ExitStack] = {}

    def add(self, name: str) -> None:
        """Start and warm up contender `name`; its row says so when it cannot run."""
        self._contest.say(f"starting {name}")
        starters: dict[str, Callable[[], Row]] = {
            "ours": self._ours,
            "lru": lambda: self._lru("lru", prefetches=False),
            "lru_prefetch": lambda: self._lru("lru_prefetch", prefetches=True),
            "on_demand": lambda: self._fixed("on_demand", self._contest.on_demand_spec(), self._limit.total_bytes),
            "resident": lambda: self._fixed("resident", self._contest.resident_spec(), None),
            "reference": lambda: self._fixed("reference", self._contest.reference_spec(), None),
            "accelerate_experts": lambda: self._accelerate("accelerate_experts"),
            "accelerate_layers": lambda: self._accelerate("accelerate_layers"),
        }
        self.rows[name] = starters[name]()

    def close(self) -> None:
        """End every process and remove its cgroup."""
        for stack in self._stacks.values():
            stack.close()
        self._stacks.clear()

    def _ours(self) -> Row:
        """Fill the limit: fewer slots by a sixteenth as long as it does not run."""
        slots = self._limit.num_slots
        while True:
            row = self._fixed("ours", self._contest.engine_spec(slots), self._limit.total_bytes)
            if row.fits or slots == 1:
                return row
            slots = max(1, slots - max(1, slots // MIN_SLOTS_STEP))
            self._contest.say(f"ours does not fit ({row.failure}); trying {slots} slots")

    def _lru(self, name: str, *, prefetches: bool) -> Row:
        """With as many slots as ours."""
        ours = self.rows.get("ours")
        slots = self._limit.num_slots if ours is None or ours.process is None else ours.process.facts["slots"]
        spec = self._contest.lru_spec(slots, prefetches=prefetches)
        return self._fixed(name, spec, self._limit.total_bytes)

    def _fixed(self, name: str, spec: Spec, limit_bytes: int | None) -> Row:
        row, stack = self._try(name, spec, limit_bytes)
        if row.failure is None:
            self._stacks[name] = stack
        elif not row.fits and limit_bytes is not None and name != "ours":
            row.smallest_bytes = self._smallest(name, spec)
        return row

    def _accelerate(self, kind: processes.Kind) -> Row:
        """The faster of the two implementations of experts; where neither runs, the smallest limit of either."""
        if importlib.util.find_spec("accelerate") is None:
            return Row(kind, None, failure="accelerate is not installed; install expertflow[compare]")
        tried: list[tuple[Row, ExitStack]] = []
        try:
            for implementation in IMPLEMENTATIONS:
                spec = self._contest.accelerate_spec(kind, implementation)
                row, stack = self._try(kind, spec, self._limit.total_bytes)
                row.implementation = implementation
                tried.append((row, stack))
        except BaseException:
            for _, stack in tried:
                stack.close()
            raise
        running = [pair for pair in tried if pair[0].failure is None]
        if not running:
            row = tried[0][0]
            row.fits = all(each.fits for each, _ in tried)
            if not row.fits:
                found = [self._smallest(kind, self._contest.accelerate_spec(kind, name)) for name in IMPLEMENTATIONS]
                row.smallest_bytes = min((each for each in found if each is not None), default=None)
            return row
        best = min(running, key=lambda pair: pair[0].warm_s_per_token or float("inf"))
        for row, stack in running:
            if row is not best[0]:
                stack.close()
        self._stacks[kind] = best[1]
        return best[0]

    def _try(self, name: str, spec: Spec, limit_bytes: int | None) -> tuple[Row, ExitStack]:
        stack = ExitStack()
        row = Row(name, None)
        try:
            label = f"{name}-{spec.implementation}" if spec.implementation else name
            row.process = stack.enter_context(self._contest.start(label, spec, limit_bytes))
            drop_pages(self._contest.files)
            warm_up(row, self._contest.warm_request, self._contest.num_tokens, self._contest.cap_s)
        except ContenderFailed as error:
            stack.close()
            row.process, row.failure, row.fits = None, str(error), not error.out_of_memory
        except BaseException:
            stack.close()
            raise
        return row, stack

    def _smallest(self, name: str, spec: Spec) -> int | None:
        """Smallest limit at which this contender decodes a few tokens."""

        def works(limit_bytes: int) -> bool:
            self._contest.say(f"{name} does not fit; trying {limit_bytes >> 20} MiB")
            try:
                with self._contest.start(f"{name}-try", spec, limit_bytes) as process:
                    warm_up(Row(name, process), self._contest.warm_request, PROBE_TOKENS, 0.0)
            except ContenderFailed:
                return False
            return True

        largest = self._contest.sizes.total_bytes + self._limit.process_bytes
        return smallest_working(works, self._limit.total_bytes, max(largest, 2 * self._limit.total_bytes))


@contextmanager
def field(contest: Contest, limit: Limit) -> Iterator[Field]:
    """A field whose processes end with the block."""
    running = Field(contest, limit)
    try:
        yield running
    finally:
        running.close()
