"""What goes on beside a trial: read from made-up counters, and judged against what is usual."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.hardware.counters import Snapshot, read_snapshot
from harness.hardware.readings import GpuState, Reading, Status
from harness.measure import environment
from harness.measure.environment import (
    Conditions,
    GpuConditions,
    Surroundings,
    changes,
)
from runtime import machine

CPUS = sorted(os.sched_getaffinity(0))
START = Snapshot(100.0, 1000.0, 5.0, (0, 0), 0, 0, 0.0, 0, 8 << 30)


def _after(seconds: float = 10.0, **changed: Any) -> Snapshot:
    return replace(START, time_s=START.time_s + seconds, **changed)


def _between(own_cpu_s: float = 0.0, **changed: Any) -> Conditions:
    return Conditions.between(START, _after(**changed), own_cpu_s)


QUIET = _between()


def test_counters_are_read_of_the_cpus_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, system, ticks = tmp_path / "proc", tmp_path / "sys", os.sysconf("SC_CLK_TCK")
    rows = [f"cpu{number} {ticks} 0 {ticks} 9999 9999 0 {ticks} {2 * ticks} 0 0" for number in CPUS]
    for number, milliseconds in ((0, 700), (1, 1200)):
        folder = system / f"devices/system/cpu/cpu{number}/thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "package_throttle_total_time_ms").write_text(f"{milliseconds}\n")
    (proc / "pressure").mkdir(parents=True)
    (proc / "stat").write_text("\n".join(["cpu 1 1 1 1 1 1 1 1 0 0", *rows, "cpu99999 5 5 5 5 5 5 5 5 0 0", "ctxt 7"]))
    (proc / "vmstat").write_text("pgfault 5\npswpin 3\npswpout 4\n")
    (proc / "pressure/memory").write_text("some avg10=0.00 total=2500000\nfull avg10=0.00 total=1\n")
    monkeypatch.setattr(machine, "cpu_quota_periods", lambda: (50, 7))
    found = read_snapshot(proc, system)
    assert (found.busy_s, found.steal_s) == (3 * len(CPUS), 2 * len(CPUS))
    assert found.throttled_ms == (700, 1200) and found.memory_stall_s == 2.5
    assert found.swapped_bytes == 7 * os.sysconf("SC_PAGE_SIZE") and (found.num_periods, found.num_quota_waits) == (
        50,
        7,
    )


def test_counters_that_the_kernel_does_not_keep_are_zero(tmp_path: Path) -> None:
    found = read_snapshot(tmp_path, tmp_path)
    assert (found.busy_s, found.steal_s, found.throttled_ms, found.swapped_bytes) == (0.0, 0.0, (), 0)


def test_this_machine_can_be_read() -> None:
    first, second = read_snapshot(), read_snapshot()
    assert 0 < first.busy_s <= second.busy_s and first.available_bytes > 0


def test_waits_for_the_quota_are_those_of_every_group_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/outer/inner\n")
    (tmp_path / "self/mountinfo").write_text(f"35 31 0:32 / {tmp_path}/cg rw - cgroup2 cgroup rw\n")
    for folder, waits in (("outer", 3), ("outer/inner", 4)):
        (tmp_path / "cg" / folder).mkdir(parents=True)
        (tmp_path / "cg" / folder / "cpu.stat").write_text(f"usage_usec 1\nnr_periods 100\nnr_throttled {waits}\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.cpu_quota_periods() == (200, 7)


def test_what_the_trial_used_is_not_foreign() -> None:
    cores_s = 10.0 * len(CPUS)
    found = _between(
        0.5 * cores_s,
        busy_s=START.busy_s + 0.8 * cores_s,
        steal_s=START.steal_s + 0.1 * cores_s,
        throttled_ms=(0, 2500),
        num_periods=100,
        num_quota_waits=30,
        memory_stall_s=1.0,
        swapped_bytes=4096,
        available_bytes=6 << 30,
    )
    assert found.foreign_share == pytest.approx(0.3) and found.steal_share == pytest.approx(0.1)
    assert found.thermal_share == 0.25 and found.quota_share == 0.3
    assert found.memory_stall_share == 0.1 and found.swapped_bytes == 4096 and found.available_bytes == 6 << 30


def test_counting_ticks_too_few_is_no_negative_load() -> None:
    assert _between(own_cpu_s=3.0, busy_s=START.busy_s + 2.9).foreign_share == 0


def test_the_record_is_small_and_json() -> None:
    assert set(QUIET.as_dict()) >= {"steal_share", "foreign_share", "thermal_share"}
    assert not any(name.startswith("gpu") for name in QUIET.as_dict())
    found = replace(QUIET, steal_share=1 / 3, gpu=GpuConditions(pcie_width=16)).as_dict()
    assert found["gpu_pcie_width"] == 16 and found["steal_share"] == 0.3333


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"steal_share": 0.2}, ""),  # everyday on a shared machine
        ({"steal_share": 0.3}, "other machines took 30% of the cores, usually 0%"),
        ({"foreign_share": 0.2}, ""),
        ({"foreign_share": 0.6}, "other processes took 60%"),
        ({"thermal_share": 0.05}, ""),
        ({"thermal_share": 0.5}, "throttled for heat 50%"),
        ({"quota_share": 0.5, "own_share": 0.5}, "CPU quota in 50%"),
        ({"quota_share": 0.5, "own_share": 0.97}, ""),  # the trial itself used it up
        ({"available_bytes": 5 << 30}, "others left 5.37 GB of memory, usually 8.59 GB"),
        ({"available_bytes": 7 << 30}, ""),
        ({"memory_stall_share": 0.9, "swapped_bytes": 1 << 30}, ""),  # a configuration too large for the machine
    ],
)
def test_what_counts_as_a_change(now: dict[str, Any], said: str) -> None:
    found = changes(replace(QUIET, **now), [QUIET] * 3)
    assert said in found and bool(said) == bool(found)


def test_load_that_is_usual_is_no_change() -> None:
    busy = replace(QUIET, foreign_share=0.5)
    assert changes(replace(busy, foreign_share=0.7), [busy, QUIET, busy]) == ""
    assert changes(replace(busy, foreign_share=0.8), [busy, QUIET, busy]) != ""
    assert changes(QUIET, [busy] * 3) == ""


def test_where_others_fill_all_cores_what_they_took_is_no_measure_of_how_they_disturbed() -> None:
    many_threads = replace(QUIET, foreign_share=0.2, wait_share=0.5)
    one_thread = replace(QUIET, foreign_share=0.6, wait_share=0.55)
    assert changes(one_thread, [many_threads] * 3) == ""
    assert changes(replace(one_thread, wait_share=0.7), [many_threads] * 3) != ""
    # More threads than cores wait for one another, whoever else is there.
    assert changes(replace(QUIET, wait_share=0.5), [replace(QUIET, wait_share=0.0)] * 3) == ""


def test_the_first_trial_has_nothing_to_differ_from() -> None:
    assert changes(replace(QUIET, foreign_share=0.9, thermal_share=1.0), []) == ""


def test_a_change_that_stays_is_the_new_usual() -> None:
    surroundings, busy = Surroundings(), replace(QUIET, foreign_share=0.6)
    verdicts = [bool(surroundings.changed(one)) for one in [QUIET] * 9 + [busy] * 9]
    assert not any(verdicts[:9]) and all(verdicts[9:13]) and not any(verdicts[14:])


def _gpu(**changed: Any) -> GpuState:
    missing: Reading[Any] = Reading(None, Status.NOT_SUPPORTED)
    state = GpuState("GPU-1", Status.OK, missing, missing, missing, missing, missing, missing, missing)
    return replace(state, **{name: Reading(value) if name != "status" else value for name, value in changed.items()})


def _states(*states: GpuState) -> Callable[[], GpuState]:
    coming = iter(states)
    return lambda: next(coming)


def _watched(*states: GpuState) -> Conditions:
    watch = Surroundings(_states(*states), lambda: START).watch()
    for _ in states[2:]:
        watch.sample()
    return watch.end(0.0)


IDLE = _gpu(pcie_generation=1, pcie_width=16, throttle_reasons=(), foreign_processes=())
COPYING = replace(IDLE, pcie_generation=Reading(4), foreign_processes=Reading((4711,)))  # the trial itself


def test_a_gpu_is_seen_while_the_trial_runs_and_its_other_users_around_it() -> None:
    throttled = replace(COPYING, throttle_reasons=Reading(("hardware slowdown",)))
    found = _watched(IDLE, COPYING, throttled, replace(IDLE, foreign_processes=Reading((12,)))).gpu
    assert found == GpuConditions("", ("hardware slowdown",), 4, 16, (12,))


def test_a_gpu_that_supports_nothing_changes_nothing() -> None:
    found = _watched(_gpu(), _gpu(), _gpu())
    assert found.gpu == GpuConditions() and changes(found, [found, found]) == ""


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (GpuConditions(pcie_generation=4, pcie_width=16), ""),
        (GpuConditions(pcie_generation=3, pcie_width=16), "the GPU's PCIe generation fell to 3 from 4"),
        (GpuConditions(pcie_generation=4, pcie_width=8), "the GPU's PCIe width fell to 8 from 16"),
        (GpuConditions(), ""),  # too short to be looked at
        (GpuConditions(throttle_reasons=("software power cap",)), ""),  # as usual
        (GpuConditions(throttle_reasons=("hardware slowdown",)), "the GPU was throttled: hardware slowdown"),
        (GpuConditions(foreign_processes=(7, 12)), "new on the GPU: 12"),
    ],
)
def test_what_counts_as_a_change_of_the_gpu(now: GpuConditions, said: str) -> None:
    usual = replace(QUIET, gpu=GpuConditions("", ("software power cap",), 4, 16, (7,)))
    found = changes(replace(QUIET, gpu=now), [usual, usual, replace(QUIET, gpu=GpuConditions())])
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("status", [Status.GPU_LOST, Status.RESET_REQUIRED])
def test_a_lost_gpu_is_noticed_while_and_after_the_trial_runs(status: Status) -> None:
    watch = Surroundings(_states(IDLE, COPYING, _gpu(status=status), IDLE), lambda: START).watch()
    assert watch.sample() == "" and watch.sample().startswith(environment.GPU_LOST)
    lost = watch.end(0.0).gpu
    assert lost is not None and lost.lost.startswith(environment.GPU_LOST)
    assert _watched(IDLE, _gpu(status=status)).gpu == GpuConditions(lost=f"GPU lost: NVML says {status}")


@pytest.mark.parametrize("status", [one for one in Status if one not in (Status.GPU_LOST, Status.RESET_REQUIRED)])
def test_a_gpu_that_cannot_be_read_is_not_lost(status: Status) -> None:
    found = _watched(_gpu(status=status), _gpu(status=status), _gpu(status=status)).gpu
    assert found is not None and found.lost == ""


def test_cpu_time_of_this_process_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0])
    monkeypatch.setattr(environment.time, "process_time", lambda: next(times))
    snapshots = iter([START, _after(busy_s=START.busy_s + 7.0)])
    watch = Surroundings(read=lambda: next(snapshots)).watch()
    assert watch.end(4.0).foreign_share == pytest.approx(1.0 / (10 * len(CPUS)))
