"""How much of the host's memory experts may take, and what is refused before it is taken."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import host_memory as host
from runtime.errors import BudgetError
from runtime.host_memory import HostMemory, PoolNeed, host_memory, plan_host

GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "may_lock", "memlock", "pinnable"),
    [
        (resource.RLIM_INFINITY, False, None, 22 * GIB),
        (8 << 20, False, 8 << 20, 8 << 20),
        (8 << 20, True, None, 22 * GIB),
        (64 * GIB, False, 64 * GIB, 22 * GIB),
    ],
)
def test_what_can_be_pinned_is_the_smaller_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, may_lock: bool, memlock: int | None, pinnable: int
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(host, "_may_lock", lambda: may_lock)
    monkeypatch.setattr("runtime.machine.total_memory_bytes", lambda: 80 * GIB)
    monkeypatch.setattr("runtime.machine.available_memory_bytes", lambda: 30 * GIB)
    memory = host_memory()
    assert (memory.memlock_bytes, memory.pinnable_bytes) == (memlock, pinnable)


@pytest.mark.parametrize(("capabilities", "may_lock"), [("0000000000004000", True), ("00000000a80425fb", False)])
def test_the_capability_lifts_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, may_lock: bool
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr("runtime.machine.PROC", tmp_path)
    assert host._may_lock() is may_lock


def test_memory_of_this_machine_is_consistent() -> None:
    memory = host_memory()
    assert 0 <= memory.pinnable_bytes < memory.available_bytes <= memory.total_bytes


ONE = PoolNeed(num_experts=100, slab_bytes=GIB, row_bytes=GIB, least_rows=4)


@pytest.mark.parametrize(
    ("total", "available", "memlock", "host_bytes", "pinned", "pageable", "disk"),
    [
        (200, 150, None, None, 100, 0, 0),  # all of it
        (200, 150, 30, None, 30, 70, 0),  # more than can be pinned
        (200, 150, None, 60, 60, 0, 40),  # as asked for
        (200, 150, 30, 60, 30, 30, 40),
        (200, 150, None, 500, 100, 0, 0),  # more than there is
        (100, 70, None, None, 60, 0, 40),  # a tenth is kept free
        (100, 70, 0, None, 0, 60, 40),
        (100, 14, None, None, 4, 0, 96),  # as little as works
    ],
)
def test_where_experts_rest(
    total: int,
    available: int,
    memlock: int | None,
    host_bytes: int | None,
    pinned: int,
    pageable: int,
    disk: int,
) -> None:
    limit = None if memlock is None else memlock * GIB
    memory = HostMemory(total * GIB, available * GIB, limit)
    plan = plan_host([ONE], memory, None if host_bytes is None else host_bytes * GIB)
    assert (plan.pinned_bytes, plan.pageable_bytes, plan.disk_bytes) == (pinned * GIB, pageable * GIB, disk * GIB)
    assert plan.holds_all == (disk == 0)


def test_a_plan_is_one_line_with_its_reasons() -> None:
    plan = plan_host([ONE], HostMemory(200 * GIB, 150 * GIB, 30 * GIB), 60 * GIB)
    assert plan.describe() == (
        "32.2 GB of pinned host memory and 32.2 GB of pageable host memory hold experts, 42.9 GB stay on disk "
        "(tiers.host_bytes 64.4 GB; 161 GB are free, 21.5 GB of them kept so, RLIMIT_MEMLOCK 32.2 GB)"
    )


@pytest.mark.parametrize(
    ("available", "host_bytes", "message"),
    [
        (70, 61, r"65\.5 GB of host memory are asked for \(tiers.host_bytes\), but 75\.2 GB are free, 10\.7 GB of "),
        (13, None, r"3\.22 GB of host memory do not hold the experts of one layer step \(4 rows of 1\.07 GB, which "),
        (5, None, "^0 B of host memory do not hold"),
        (70, 1, r"which takes 4294967296 bytes in all; tiers\.host_bytes 1\.07 GB; .* raise tiers.host_bytes"),
    ],
)
def test_what_would_end_in_an_oom_kill_is_refused(available: int, host_bytes: int | None, message: str) -> None:
    memory = HostMemory(100 * GIB, available * GIB, None)
    with pytest.raises(BudgetError, match=message):
        plan_host([ONE], memory, None if host_bytes is None else host_bytes * GIB)


needs = st.builds(
    PoolNeed, st.integers(8, 600), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8)
)  # 8 experts hold the rows of a step


@given(st.lists(needs, min_size=1, max_size=3), st.integers(0, 30000), st.none() | st.integers(0, 30000), st.data())
def test_no_plan_takes_more_than_is_allowed_and_what_it_names_as_least_works(
    pools: list[PoolNeed], available: int, memlock: int | None, data: st.DataObject
) -> None:
    host_bytes = data.draw(st.none() | st.integers(1, 40000))
    memory = HostMemory(20000, available, memlock)
    try:
        plan = plan_host(pools, memory, host_bytes)
    except BudgetError as error:
        if "takes" in str(error):
            least = int(str(error).partition("takes ")[2].partition(" ")[0])
            plan_host(pools, HostMemory(0, least, None))
            if least > 1:
                with pytest.raises(BudgetError):
                    plan_host(pools, HostMemory(0, least - 1, None))
        return
    taken = plan.pinned_bytes + plan.pageable_bytes
    assert taken <= memory.usable_bytes and (host_bytes is None or taken <= host_bytes)
    assert memlock is None or plan.pinned_bytes <= memlock
    for need, share in zip(pools, plan.shares, strict=True):
        assert min(need.least_rows, need.num_experts) <= share.num_rows <= need.num_experts
        assert 0 <= share.num_pinned <= share.num_rows
