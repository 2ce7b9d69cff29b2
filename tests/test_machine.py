"""Memory, CPUs and control groups of this machine and of made-up ones; the memory sum."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import machine
from runtime.errors import BudgetError, UsageError

GIB = 1 << 30


class FakeHost:
    """A /proc and control groups in a folder; 16 GiB of memory, 12 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {12 << 20} kB\n")

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def mount(self, *mounts: str) -> None:
        """Each "type options mount-folder root"."""
        lines = []
        for mount in mounts:
            kind, options, folder, root = mount.split()
            lines.append(f"35 31 0:32 {root} {self.root / folder} rw,relatime shared:1 - {kind} cgroup rw,{options}")
        self.write("proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/root rw", *lines]))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    return FakeHost(tmp_path)


def test_without_control_groups_the_machine_itself_counts(host: FakeHost) -> None:
    assert machine.total_memory_bytes() == 16 * GIB
    assert machine.available_memory_bytes() == 12 * GIB


def test_a_v2_group_limits_and_its_page_cache_is_free(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/user/job")
    host.mount("cgroup2 nsdelegate cg /")
    host.write("cg/user/job/memory.max", 4 * GIB)
    host.write("cg/user/job/memory.current", 3 * GIB)
    host.write("cg/user/job/memory.stat", f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\nslab 5")
    assert machine.total_memory_bytes() == 4 * GIB
    assert machine.available_memory_bytes() == int(2.5 * GIB)


def test_the_tightest_group_on_the_way_up_counts(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/user/job")
    host.mount("cgroup2 x cg /")
    host.write("cg/user/job/memory.max", "max")
    host.write("cg/user/job/memory.current", GIB)
    host.write("cg/user/memory.max", 8 * GIB)
    host.write("cg/user/memory.current", 7 * GIB)
    host.write("cg/memory.max", 10 * GIB)
    host.write("cg/memory.current", GIB)
    assert machine.available_memory_bytes() == GIB
    host.write("cg/user/job/memory.high", int(1.5 * GIB))
    assert machine.available_memory_bytes() == GIB // 2


def test_a_v1_group_counts_its_children_s_page_cache(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n0::/")
    host.mount("cgroup rw,memory cg/memory /", "cgroup name=systemd cg/systemd /", "cgroup2 x cg/unified /")
    host.write("cg/memory/memory.limit_in_bytes", 9223372036854771712)
    host.write("cg/memory/memory.usage_in_bytes", 9 * GIB)
    host.write("cg/memory/job/memory.limit_in_bytes", 4 * GIB)
    host.write("cg/memory/job/memory.usage_in_bytes", 3 * GIB)
    host.write("cg/memory/job/memory.stat", f"active_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    assert machine.available_memory_bytes() == 2 * GIB


def test_a_container_sees_its_own_group_at_the_mount_point(host: FakeHost) -> None:
    """Without a cgroup namespace /proc names the group as the host does, and the mount shows it as its root."""
    host.write("proc/self/cgroup", "4:memory:/docker/abc/inner")
    host.mount("cgroup memory cg/memory /docker/abc")
    host.write("cg/memory/memory.limit_in_bytes", 3 * GIB)
    host.write("cg/memory/memory.usage_in_bytes", GIB)
    assert machine.available_memory_bytes() == 2 * GIB
    host.write("cg/memory/inner/memory.limit_in_bytes", 2 * GIB)
    host.write("cg/memory/inner/memory.usage_in_bytes", GIB)
    assert machine.available_memory_bytes() == GIB


def test_a_group_over_its_limit_leaves_nothing(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/")
    host.mount("cgroup2 x cg /")
    host.write("cg/memory.max", GIB)
    host.write("cg/memory.current", 2 * GIB)
    assert machine.available_memory_bytes() == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cpus_within_the_quota(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    host.write("proc/self/cgroup", "0::/job" if "cpu.max" in files else "3:cpu,cpuacct:/job")
    host.mount("cgroup2 x cg /" if "cpu.max" in files else "cgroup cpu,cpuacct cg /")
    for name, text in files.items():
        host.write(f"cg/job/{name}", text)
    assert machine.cpu_count() == expected


def test_cpus_within_the_affinity() -> None:
    assert 1 <= machine.cpu_count() <= len(os.sched_getaffinity(0))


def test_this_machine_s_figures_go_together() -> None:
    assert 0 < machine.resident_bytes() <= machine.peak_resident_bytes()
    assert 0 < machine.available_memory_bytes() <= machine.total_memory_bytes()


def test_the_peak_sees_memory_that_is_gone_and_can_be_reset() -> None:
    before = machine.peak_resident_bytes()
    size = before + (32 << 20) - machine.resident_bytes()
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert machine.resident_bytes() >= before
    peak = machine.peak_resident_bytes()
    assert peak >= before + (16 << 20)
    if not machine.reset_peak():
        pytest.skip("the kernel does not permit resetting the peak")
    assert machine.peak_resident_bytes() < peak - (16 << 20)


def test_resetting_the_peak_where_it_is_not_permitted(host: FakeHost) -> None:
    (host.root / "proc/self/clear_refs").mkdir(parents=True)
    assert machine.reset_peak() is False


def test_bytes_read(host: FakeHost) -> None:
    assert machine.bytes_read_from_disk() is None
    host.write("proc/self/io", "rchar: 10\nwchar: 0\nread_bytes: 4096\nwrite_bytes: 0")
    assert machine.bytes_read_from_disk() == 4096


def test_the_fingerprint_names_versions_without_importing_them() -> None:
    code = (
        "import sys; from runtime import machine; facts = machine.fingerprint();"
        "assert 'torch' not in sys.modules and 'pynvml' not in sys.modules;"
        "assert facts['python'] and facts['cores'] >= 1 and facts['device'] == 'cpu' and facts['torch'], facts;"
        "assert all(isinstance(value, (str, int)) for value in facts.values())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_memory_sum_is_told_in_one_line() -> None:
    memory = machine.required_bytes(30_000_000, 64, 6_291_456, 20_000_000, 10_000_000)
    assert memory.total_bytes == 462_653_184
    assert memory.describe() == (
        "dense 30.0 MB + slots 64 x 6.29 MB + KV 20.0 MB + process and buffers 10.0 MB = 463 MB"
    )


SIZES = st.integers(0, 10**12)


@given(limit=SIZES, dense=SIZES, slot=st.integers(1, 10**9), kv=SIZES, buffers=SIZES)
def test_the_slots_that_fit_fit_and_one_more_does_not(limit: int, dense: int, slot: int, kv: int, buffers: int) -> None:
    def total(num_slots: int) -> int:
        return machine.required_bytes(dense, num_slots, slot, kv, buffers).total_bytes

    try:
        num_slots = machine.slots_that_fit(limit, dense, slot, kv, buffers)
    except BudgetError:
        assert total(1) > limit
    else:
        assert num_slots >= 1 and total(num_slots) <= limit < total(num_slots + 1)


def test_a_limit_below_one_expert_names_the_smallest_that_works() -> None:
    with pytest.raises(BudgetError) as caught:
        machine.slots_that_fit(1_000_000, dense_bytes=700_000, slot_bytes=400_000, kv_bytes=0, buffer_bytes=50_000)
    message = str(caught.value)
    assert "1.00 MB" in message and "1150000 bytes" in message and "--max-memory" in message and "\n" not in message
    assert machine.slots_that_fit(1_150_000, 700_000, 400_000, 0, 50_000) == 1


def test_the_kv_cache_of_a_grouped_query_model() -> None:
    config = SimpleNamespace(
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=256
    )
    assert machine.kv_cache_bytes(config, context=100, batch=3, dtype_bytes=2) == 2 * 8 * 2 * 64 * 100 * 3 * 2
    del config.head_dim, config.num_key_value_heads
    assert machine.kv_cache_bytes(config, context=1, batch=1, dtype_bytes=4) == 2 * 8 * 4 * 64 * 4


def test_the_kv_cache_takes_the_text_part_and_admits_what_it_does_not_know() -> None:
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2, hidden_size=8)
    assert machine.kv_cache_bytes(SimpleNamespace(get_text_config=lambda: text), 10, 1, 2) == 2 * 2 * 2 * 4 * 10 * 2
    assert machine.kv_cache_bytes(SimpleNamespace(num_hidden_layers=2), 10, 1, 2) == 0


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1.5GiB", 3 << 29),
        ("800MB", 800_000_000),
        ("6M", 6 << 20),
        ("1 mib", 1 << 20),
        ("0.1GB", 100_000_000),
        ("2TiB", 2 << 40),
        ("123", 123),
        (4096, 4096),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read(text: str | int, num_bytes: int) -> None:
    assert machine.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1.5XB", "1e9", "0", "0.1B", "1GiB2", -4, "nan"])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"size|less than"):
        machine.parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (6_291_456, "6.29 MB"), (16e9, "16.0 GB"), (999_999, "1.00 MB"), (123e6, "123 MB")],
)
def test_sizes_are_told(num_bytes: float, text: str) -> None:
    assert machine.format_bytes(num_bytes) == text


def test_matrix_products_of_many_shapes_are_not_kept() -> None:
    code = """
import torch
from runtime import machine
machine.return_freed_memory()
machine.limit_matmul_caches()
weight = torch.ones(256, 128, dtype=torch.bfloat16)
torch.ones(400, 128, dtype=torch.bfloat16) @ weight.T
before = machine.resident_bytes()
for rows in range(1, 400):
    torch.ones(rows, 128, dtype=torch.bfloat16) @ weight.T
print((machine.resident_bytes() - before) >> 20)
"""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150  # 101 MiB; 237 without the limit (on a processor with AMX)


def test_the_environment_decides_how_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    machine.limit_matmul_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "")
