"""The bandwidth curve and its fit; the memory sum."""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict
from pathlib import Path

import pytest

from harness.hardware import bandwidth
from harness.hardware.bandwidth import SIZES, THREADS, fit, measure_curve
from harness.hardware.memory import MemoryModel
from runtime.errors import BudgetError


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(range(256)) * (5 << 12))
    return path


class VirtualDisk:
    """Reads that take latency + bytes / rate on a clock of their own, one after the other."""

    def __init__(self) -> None:
        self.now, self.bytes_per_s = 0.0, 2e9

    def read(self, descriptor: int, buffer: mmap.mmap, offset: int, direct: bool) -> float:
        seconds = 1e-4 + len(buffer) / self.bytes_per_s
        self.now += seconds
        return seconds


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> VirtualDisk:
    virtual = VirtualDisk()
    monkeypatch.setattr(bandwidth, "_read", virtual.read)
    monkeypatch.setattr(bandwidth, "_clock", lambda: virtual.now)
    return virtual


def test_the_fit_finds_latency_and_asymptote() -> None:
    latency_s, bytes_per_s = fit([(size, 2e-4 + size / 5e8) for size in SIZES])
    assert (latency_s, bytes_per_s) == (pytest.approx(2e-4), pytest.approx(5e8))


def test_the_fit_survives_one_disturbed_size() -> None:
    times = [[size, 2e-4 + size / 5e8] for size in (*SIZES, 8 << 20)]
    times[2][1] *= 30
    assert fit([(size, time) for size, time in times])[1] == pytest.approx(5e8, rel=0.05)


@pytest.mark.parametrize("points", [[], [(4096, 1.0)], [(4096, 2.0), (8192, 1.0)]])
def test_points_that_do_not_rise_have_no_fit(points: list[tuple[float, float]]) -> None:
    assert fit(points) == (None, None)


def test_the_curve_has_every_size_that_fits_and_the_exact_expert(blob: Path, disk: VirtualDisk) -> None:
    curve = measure_curve([blob], 300_000, 1e9, budget_s=0.3)
    sizes = [point.num_bytes for point in curve.series[0].points]
    assert sizes == [4 << 10, 16 << 10, 64 << 10, 256 << 10, 303104, 1 << 20, 4 << 20]
    assert {series.threads for series in curve.series} == set(THREADS)
    assert all(point.num_reads >= series.threads for series in curve.series for point in series.points)
    assert [series.under_load for series in curve.series] == [False] * (len(curve.series) - 1) + [True]
    assert all(series.latency_s == pytest.approx(1e-4, abs=1e-6) for series in curve.series)
    unloaded = [series for series in curve.series if not series.under_load]
    assert curve.best_bytes_per_s == max(point.bytes_per_s for series in unloaded for point in series.points)
    assert json.loads(json.dumps(asdict(curve)))["engine_bytes_per_s"] == 1e9


def test_sizes_for_which_there_is_no_time_are_left_out_but_the_expert_s_is_not(blob: Path, disk: VirtualDisk) -> None:
    """4 MiB take four seconds."""
    disk.bytes_per_s = 1e6
    curve = measure_curve([blob], 1 << 20, 1.0, budget_s=3.0)
    for series in curve.series:
        sizes = [point.num_bytes for point in series.points]
        assert sizes[-1] == 1 << 20 and 4 << 20 not in sizes and sizes[0] == 4 << 10
    num_reads = sum(series.threads for series in curve.series)
    assert disk.now < 3.0 + num_reads * 1.1, "the budget, and one read of an expert by every thread"


def test_buffers_stay_within_a_share_of_the_memory(
    blob: Path, disk: VirtualDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.hardware.bandwidth.machine.available_memory_bytes", lambda: 16 << 20)
    curve = measure_curve([blob], 65536, 1.0, budget_s=0.7)
    largest = {series.threads: series.points[-1].num_bytes for series in curve.series if not series.under_load}
    assert largest == {1: 1 << 20, 2: 1 << 20, 4: 256 << 10}


def test_the_kernel_s_count_tells_a_disk_from_memory(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([1000, 1000])
    monkeypatch.setattr("harness.hardware.bandwidth.machine.bytes_read_from_disk", lambda: next(counts))
    assert measure_curve([blob], 65536, 1.0, budget_s=0.07).counted_share == 0
    monkeypatch.setattr("harness.hardware.bandwidth.machine.bytes_read_from_disk", lambda: None)
    assert measure_curve([blob], 65536, 1.0, budget_s=0.07).counted_share is None


def test_a_file_smaller_than_every_size_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(10_000))
    curve = measure_curve([path], 1 << 20, 1.0, budget_s=0.05)
    assert [point.num_bytes for point in curve.series[0].points] == [4096, 8192]


def test_without_direct_reads_the_curve_is_buffered(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "takes_direct", lambda file: False)
    assert not any(series.direct for series in measure_curve([blob], 65536, 1.0, budget_s=0.1).series)


def test_a_read_that_comes_back_short_is_an_error(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.preadv", lambda *_: 17)
    with pytest.raises(OSError, match="short read"):
        measure_curve([blob], 65536, 1.0, budget_s=0.1)


MEMORY = MemoryModel(num_experts=64, slot_bytes=1000, dense_bytes=500, buffer_bytes=300, kv_bytes_per_sequence=10)


def test_memory_is_the_sum_of_its_parts() -> None:
    assert MEMORY.predict(8, 4).total_bytes == 500 + 8 * 1000 + 300 + 40


def test_slots_fill_the_limit_and_stop_at_all_experts() -> None:
    assert MEMORY.slots_that_fit(8 * 1000 + 840, 4) == 8 and MEMORY.slots_that_fit(8 * 1000 + 839, 4) == 7
    assert MEMORY.slots_that_fit(1 << 40, 1) == 64


def test_a_limit_below_one_expert_is_refused_with_the_smallest_that_works() -> None:
    with pytest.raises(BudgetError, match="1810 bytes"):
        MEMORY.slots_that_fit(1000, 1)
