"""Memory cgroups and the page cache, for real where the machine allows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.measure import cgroup
from harness.measure.cgroup import CgroupUnavailable, MemoryCgroup, memory_cgroup, unavailable_reason
from harness.measure.pages import drop_pages, resident_fraction

REASON = unavailable_reason()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup can be made here: {REASON}")

ALLOCATE = """
import sys
from harness.measure.cgroup import join
join(sys.argv[1])
block = bytearray(int(sys.argv[2]))
print(len(block))
"""


def _allocate(group: MemoryCgroup, size: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALLOCATE, str(group.path), str(size)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


@needs_cgroup
def test_what_fits_the_limit_runs_and_its_peak_is_counted() -> None:
    with memory_cgroup("test", 96 << 20) as group:
        assert group.limit_bytes == 96 << 20
        assert _allocate(group, 32 << 20).returncode == 0
        peak = group.peak_bytes
        assert peak is not None and 32 << 20 <= peak < 64 << 20
        assert group.num_oom_kills == 0
    assert not group.path.exists()


@needs_cgroup
def test_what_exceeds_the_limit_is_killed_and_the_group_goes_away() -> None:
    with memory_cgroup("test", 32 << 20) as group:
        assert _allocate(group, 128 << 20).returncode == -9
        assert group.num_oom_kills == 1
    assert not group.path.exists()


@needs_cgroup
def test_no_limit_is_no_limit() -> None:
    with memory_cgroup("test", None) as group:
        assert group.limit_bytes is None


@needs_cgroup
def test_groups_of_dead_processes_are_removed() -> None:
    with memory_cgroup("test", None) as group:
        stale = group.path.parent / f"expertflow-{2**22 + 1}-left"  # beyond the largest process id
        stale.mkdir()
        with memory_cgroup("other", None):
            assert not stale.exists() and group.path.exists()


def test_without_a_controller_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_mounts", lambda: [])
    with pytest.raises(CgroupUnavailable, match="no memory cgroup controller"), memory_cgroup("test", None):
        pass


def test_a_folder_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cgroup, "_parents", lambda: [(1, tmp_path / "missing")])
    assert "missing" in str(unavailable_reason())


def test_version_2_is_delegated_before_a_child_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    control = tmp_path / "cgroup.subtree_control"
    control.write_text("cpu")
    monkeypatch.setattr(cgroup, "_parents", lambda: [(2, tmp_path)])
    group = cgroup._create(f"expertflow-{os.getpid()}-x")
    assert control.read_text() == "+memory" and group.path.is_dir()
    for name, text in {"memory.max": "max", "memory.peak": "7", "memory.events": "low 0\noom_kill 3\n"}.items():
        (group.path / name).write_text(text)
    assert (group.limit_bytes, group.peak_bytes, group.num_oom_kills) == (None, 7, 3)
    (group.path / "memory.swap.max").write_text("max")
    group.set_limit(5 << 20)
    assert group.limit_bytes == 5 << 20 and (group.path / "memory.swap.max").read_text() == "0"


def test_a_written_file_is_cached_until_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    before = resident_fraction([path])
    drop_pages([path])
    if before < 0.9:
        pytest.skip("this file system keeps no page cache")
    assert resident_fraction([path]) < 0.01
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(1 << 20)
    assert 0.2 < resident_fraction([path]) < 0.3


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resident_fraction([tmp_path / "empty"]) == 0.0
