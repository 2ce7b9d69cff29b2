"""How many expert slots are in use, over all pools in proportion: at most what was asked for, fewer while memory is
short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime import machine
from runtime.errors import BudgetError, UsageError
from runtime.pool import Pool
from runtime.pressure import RESERVE_BYTES, PressureWatch

MOST_NOTES = 20  # of shrinks
_RESERVED = "but the device keeps their bytes reserved"


class SlotBudget:
    """The slots of `pools`, changed between passes only: the caller sees to that.

    Attributes:
        notes: one line for each time that memory was short, or that slots of a GPU went out of use.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = tuple(pools)
        self._num_loaded = sum(pool.arena.num_slots for pool in pools)
        self._num_most = self._num_loaded  # that may be used when memory is free
        self._num_shrinks = 0
        self.notes: tuple[str, ...] = ()
        for pool in pools:  # compiled now: when memory is short is no time for a compiler
            pool.coordinator.residency.plan_shrink(pool.num_slots)

    @property
    def is_on_host(self) -> bool:
        """There are slots, and they take the host's memory."""
        return bool(self._pools) and all(pool.arena.is_on_host for pool in self._pools)

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return sum(pool.num_slots for pool in self._pools)

    @property
    def uncharged_bytes(self) -> int:
        """Memory that the slots in use will take once they are filled."""
        return sum(pool.uncharged_bytes for pool in self._pools)

    def shrink(self, num_slots: int) -> int:
        """Use at most `num_slots` from now on; the bytes that the system has back.

        Raises:
            BudgetError: less than one slot for each pool. UsageError: there are no pools.
        """
        self._limit(num_slots)
        before = self.num_slots
        given_bytes = self._use(min(pair) for pair in self._now_and(num_slots))
        if self.num_slots < before and not self.is_on_host:
            self._note(f"{self.num_slots} expert slots are used instead of {before}, {_RESERVED}")
        return given_bytes

    def grow(self, num_slots: int | None) -> None:
        """Use up to `num_slots`, at most those that were loaded with; None: all of these. Raises: see `shrink`."""
        self._limit(self._num_loaded if num_slots is None else num_slots)
        self._use(max(pair) for pair in self._now_and(self._num_most))

    def fit(self, limit_bytes: int, watch: PressureWatch) -> None:
        """Let `watch` keep the process within `limit_bytes`, beginning now.

        Raises:
            BudgetError: not even one slot for each pool fits beside the rest of the process.
            UsageError: the slots are not in its memory, or there are none.
        """
        self._check_pools()
        if not self.is_on_host:
            raise UsageError(
                "expert slots of a GPU do not count to the memory of the process: a limit of that cannot be kept with "
                "them; set limits.max_memory_bytes in the profile, which is of the GPU's memory, and load it again"
            )
        resident_bytes = machine.resident_bytes()
        rest_bytes = resident_bytes - sum(pool.charged_bytes for pool in self._pools)
        least_bytes = rest_bytes + sum(pool.arena.slot_bytes for pool in self._pools) + RESERVE_BYTES
        if limit_bytes < least_bytes:
            raise BudgetError(
                f"a memory limit of {limit_bytes} bytes: the process needs {least_bytes} now with one expert slot and "
                f"{machine.format_bytes(RESERVE_BYTES)} to spare; allow more"
            )
        watch.limit_bytes = limit_bytes
        self._give_back(-watch.spare_bytes(self.uncharged_bytes))

    def follow(self, watch: PressureWatch) -> None:
        """Use fewer slots where memory is short, more where it is free again."""
        change_bytes = watch.look(self.uncharged_bytes)
        if change_bytes < 0:
            self._give_back(-change_bytes)
        elif change_bytes > 0:
            num_slots = min(self.num_slots + change_bytes // self._slot_bytes, self._num_most)
            self._use(max(pair) for pair in self._now_and(num_slots))

    def _give_back(self, num_bytes: int) -> None:
        before = self.num_slots
        if num_bytes <= 0:
            return
        num_slots = max(0, before - -(-num_bytes // self._slot_bytes))
        self._use(min(pair) for pair in self._now_and(num_slots))
        if self.num_slots < before:
            self._note(
                f"memory is short by {machine.format_bytes(num_bytes)}: {self.num_slots} expert slots are used instead "
                f"of {before}"
            )

    def _note(self, note: str) -> None:
        self._num_shrinks += 1
        if self._num_shrinks <= MOST_NOTES:
            last = "; further times are not noted" if self._num_shrinks == MOST_NOTES else ""
            self.notes += (f"{note}{last}",)

    def _limit(self, num_slots: int) -> None:
        self._check_pools()
        if not len(self._pools) <= num_slots <= self._num_loaded:
            raise BudgetError(
                f"{num_slots} expert slots: at least {len(self._pools)} are needed, and {self._num_loaded} were loaded "
                "with (cache.slots)"
            )
        self._num_most = num_slots

    def _check_pools(self) -> None:
        if not self._pools:
            raise UsageError("a resident model has no expert slots; load it with runtime.load")

    def _now_and(self, num_slots: int) -> list[tuple[int, int]]:
        """Of each pool, slots in use and its share of `num_slots`, in proportion to what it was loaded with."""
        return [(pool.num_slots, max(1, num_slots * pool.arena.num_slots // self._num_loaded)) for pool in self._pools]

    def _use(self, slots: Iterable[int]) -> int:
        return sum(pool.resize(num_slots) for pool, num_slots in zip(self._pools, slots, strict=True))

    @property
    def _slot_bytes(self) -> int:
        """Of a slot, on average."""
        return sum(pool.arena.num_slots * pool.arena.slot_bytes for pool in self._pools) // self._num_loaded
