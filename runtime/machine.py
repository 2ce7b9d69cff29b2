"""What this machine has, what this process takes of it, and the bytes that a configuration needs.

Read from /proc and the control groups (cgroup v1 and v2); no NVML, no torch. Everything is about the host: the memory
of a GPU is asked of its driver elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.errors import BudgetError, UsageError

PROC = Path("/proc")

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as "1.5GiB" (binary), "800MB" (decimal), "6M" (binary) or a plain number.

    Raises:
        UsageError: not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{size!r} is not a size; write it like 1.5GiB, 800MB or a number of bytes")
    num_bytes = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if num_bytes < 1:
        raise UsageError(f"{size!r} is less than one byte")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """A size for people, in decimal units and three digits: "6.29 MB"."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * factor:
            digits = 2 if num_bytes < 9.995 * factor else 1 if num_bytes < 99.95 * factor else 0
            return f"{num_bytes / factor:.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def total_memory_bytes() -> int:
    """Memory of the machine, or of the tightest control group that this process is in."""
    return min([_kib_field(PROC / "meminfo", "MemTotal"), *(group.limit_bytes for group in _memory_groups())])


def available_memory_bytes() -> int:
    """Memory that this process can still take: what the machine has available, or what its control groups leave.

    Page cache charged to a group counts as available: the kernel reclaims it before it kills.
    """
    left = [group.limit_bytes - group.used_bytes for group in _memory_groups()]
    return max(0, min([_kib_field(PROC / "meminfo", "MemAvailable"), *left]))


def resident_bytes() -> int:
    """Resident memory of this process now (VmRSS)."""
    return _kib_field(PROC / "self/status", "VmRSS")


def peak_resident_bytes() -> int:
    """Highest resident memory of this process (VmHWM) since its start or `reset_peak`."""
    return _kib_field(PROC / "self/status", "VmHWM")


def reset_peak() -> bool:
    """Start `peak_resident_bytes` anew at what is resident now; False where the kernel does not permit it."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def return_freed_memory() -> None:
    """Have glibc give larger freed blocks back at once, instead of keeping as many as were ever in use.

    Its thresholds grow with the blocks that are freed, so that the activations of one long prompt stay with the process
    for good (40 MB for 512 tokens of the demo), and each thread gets its own heap. No effect with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def limit_matmul_caches() -> None:
    """Have torch keep fewer matrix products that it has prepared, where the environment does not say how many.

    It keeps one of 16-bit floats per shape, so several per length of a prompt. No effect once one has been computed.
    """
    for name, capacity in _MATMUL_CACHES.items():
        os.environ.setdefault(name, str(capacity))


# PyTorch's (of descriptions, 0.26 MB each) and oneDNN's (of code, 0.28 MB each) hold 1024 by default. 160 requests of
# 4-96 tokens to the demo take 210 MiB beyond loading so, 100 with these, in as much CPU time (25.3 and 26.2 s against
# 25.1 and 26.8, interleaved). 192 of code are too few for prompts of 512 tokens: three times the CPU time.
_MATMUL_CACHES = {"LRU_CACHE_CAPACITY": 32, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 256}

# malloc.h: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD fixed at their initial values, M_ARENA_MAX.
_MALLOC = {-3: 128 << 10, -1: 128 << 10, -8: 2}


def bytes_read_from_disk() -> int | None:
    """Bytes that this process made the disks read since its start; reads from the page cache do not count.

    None where the kernel does not keep this account (/proc/self/io).
    """
    fields = dict(line.split(": ") for line in _lines(PROC / "self/io"))
    return int(fields["read_bytes"]) if "read_bytes" in fields else None


def cpu_count() -> int:
    """CPUs that this process may keep busy: its affinity, less where a control group's quota is smaller; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, int(min([allowed, *_cpu_quotas()])))


def cpu_quota_periods() -> tuple[int, int]:
    """Periods of the CPU quotas of the control groups around this process so far, and in how many it was used up."""
    stats = [dict(line.split() for line in _lines(folder / "cpu.stat")) for folder in _group_folders("cpu")]
    return sum(int(s.get("nr_periods", 0)) for s in stats), sum(int(s.get("nr_throttled", 0)) for s in stats)


def fingerprint(device: str = "cpu") -> dict[str, str | int]:
    """What a measurement depends on, for the provenance of a profile. No host name, no serial number."""
    facts: dict[str, str | int] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": cpu_count(),
        "memory_bytes": total_memory_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


@dataclass(frozen=True, slots=True)
class MemorySum:
    """Bytes that a configuration needs, by what they are for."""

    dense_bytes: int
    num_slots: int
    slot_bytes: int
    kv_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.dense_bytes + self.num_slots * self.slot_bytes + self.kv_bytes + self.buffer_bytes

    def describe(self) -> str:
        """One line: "dense 30.0 MB + slots 64 x 6.29 MB + KV 20.0 MB + process and buffers 640 MB = 1.09 GB"."""
        slots = f"slots {self.num_slots} x {format_bytes(self.slot_bytes)}"
        rest = f"KV {format_bytes(self.kv_bytes)} + process and buffers {format_bytes(self.buffer_bytes)}"
        return f"dense {format_bytes(self.dense_bytes)} + {slots} + {rest} = {format_bytes(self.total_bytes)}"


def required_bytes(dense_bytes: int, num_slots: int, slot_bytes: int, kv_bytes: int, buffer_bytes: int) -> MemorySum:
    """The sum for `num_slots` expert slots; `buffer_bytes` is everything beside weights and KV cache."""
    return MemorySum(dense_bytes, num_slots, slot_bytes, kv_bytes, buffer_bytes)


def slots_that_fit(limit_bytes: int, dense_bytes: int, slot_bytes: int, kv_bytes: int, buffer_bytes: int) -> int:
    """The most expert slots with which the sum stays within `limit_bytes`.

    Raises:
        BudgetError: not even one fits; says the limit and the smallest that works.
    """
    least = required_bytes(dense_bytes, 1, slot_bytes, kv_bytes, buffer_bytes)
    if limit_bytes < least.total_bytes:
        raise BudgetError(
            f"a memory limit of {format_bytes(limit_bytes)} ({limit_bytes} bytes) leaves no room for one expert; "
            f"the smallest that works is {least.total_bytes} bytes ({least.describe()}); raise the limit "
            "(--max-memory, limits.max_memory_bytes), free memory, or set a smaller cache.kv_bytes"
        )
    return 1 + (limit_bytes - least.total_bytes) // slot_bytes


def kv_cache_bytes(config: Any, context: int, batch: int, dtype_bytes: int) -> int:
    """Upper bound of the KV cache of `batch` sequences of `context` tokens: keys and values of all layers and KV heads.

    Sliding windows and layers without attention are not deducted. A configuration that does not give its layers and
    heads by the usual names (state-space models, for one) gives 0: unknown here, measure it instead.

    Args:
        config: a transformers configuration; of a multimodal one its text part is taken.
        dtype_bytes: bytes per element of the cache.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    hidden_size = getattr(text, "hidden_size", None)
    head_dim = getattr(text, "head_dim", None) or (hidden_size // heads if hidden_size and heads else None)
    if not (layers and kv_heads and head_dim):
        return 0
    return int(2 * layers * kv_heads * head_dim * context * batch * dtype_bytes)


@dataclass(frozen=True, slots=True)
class _MemoryGroup:
    limit_bytes: int
    used_bytes: int


def _memory_groups() -> Iterator[_MemoryGroup]:
    """Every control group around this process that limits its memory."""
    for folder in _group_folders("memory"):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        # cgroup v1 writes "no limit" as a number close to 2**63; v2 writes the word max, which is no number.
        limit = min((limit for limit in limits if limit is not None), default=_NO_LIMIT)
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit < _NO_LIMIT:
            yield _MemoryGroup(limit, max(0, used - _page_cache_bytes(folder)))


_NO_LIMIT = 1 << 60


def _page_cache_bytes(folder: Path) -> int:
    """Page cache charged to a group and the groups inside it (v1 keeps that sum under names of its own)."""
    stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
    prefix = "total_" if "total_inactive_file" in stat else ""
    return sum(int(stat.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))


def _cpu_quotas() -> Iterator[float]:
    """CPUs that each control group around this process allows."""
    for folder in _group_folders("cpu"):
        if v2 := _lines(folder / "cpu.max"):
            quota, period = v2[0].split()
        else:
            quota, period = (str(_number(folder / f"cpu.cfs_{name}_us") or "max") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _group_folders(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups for `controller` (v1) or for all (v2), each up to its mount point."""
    groups = [line.split(":", 2)[1:] for line in _lines(PROC / "self/cgroup")]
    for mount in _lines(PROC / "self/mountinfo"):
        own, _, system = mount.partition(" - ")
        root, mount_point = own.split()[3:5]
        kind, _, options = system.split(" ", 2)
        controllers = "" if kind == "cgroup2" else controller
        if kind not in ("cgroup", "cgroup2") or (controllers and controller not in options.split(",")):
            continue
        for names, group in groups:
            if controllers in names.split(","):
                yield from _upwards(Path(mount_point), root, group)


def _upwards(mount_point: Path, root: str, group: str) -> Iterator[Path]:
    """The folder of `group` and those above it, where `mount_point` shows the hierarchy from `root` downwards."""
    inside = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
    yield mount_point / inside
    yield from (mount_point / parent for parent in inside.parents)


def _cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in _lines(PROC / "cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _kib_field(path: Path, name: str) -> int:
    """Bytes of a field that /proc gives in kB."""
    return next(int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(f"{name}:"))


def _number(path: Path) -> int | None:
    words = " ".join(_lines(path)).split()
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    """Lines of a file of the kernel's; none where there is no such file or it may not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
