"""Feeds mangled files to the readers: `python tests/fuzz/fuzzer.py --seconds 60`.

Each input must give a value or one `ExpertFlowError` with a readable line, within limits of time and memory, and
without unpickling, starting a program or writing elsewhere. An input is a function of the seed, the reader and its
number, so that every failure comes with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from readers import READERS, Reader, mangled

from runtime import machine
from runtime.errors import ExpertFlowError, one_line

INPUT_S = 5.0  # processor time of one input: what a person waits for, and a shared machine cannot lengthen
INPUT_BYTES = 256 << 20  # what one input may add to the process
MESSAGE_CHARACTERS = 4000


class Unsafe(BaseException):
    """A file made the process do what no file may."""


class TooSlow(BaseException):
    """An input took more than its time."""


@dataclass
class Count:
    """What became of one reader's inputs."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    most_bytes: int = 0
    failures: list[str] = field(default_factory=list)


_unsafe: list[str] = []  # what the running read did: a reader may swallow what is raised
_is_reading = False


def watch() -> None:
    """For the whole process: while a file is read nothing is unpickled, no program starts, YAML names no Python object.

    Compiled code is loaded from Numba's cache by pickle, but only once a value is put to use.
    """

    def guard(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if _is_reading:
                _unsafe.append(f"{getattr(owner, '__name__', owner)}.{name} was called")
                raise Unsafe(_unsafe[-1])
            return real(*arguments, **options)

        setattr(owner, name, call)

    for name in ("load", "loads", "Unpickler"):
        guard(pickle, name)
    for constructor in (yaml.constructor.FullConstructor, yaml.constructor.UnsafeConstructor):
        guard(constructor, "find_python_name")
        guard(constructor, "find_python_module")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if _is_reading and (event in _FORBIDDEN or writes):
            _unsafe.append(f"{event} {arguments!r}"[:200])
            raise Unsafe(_unsafe[-1])

    sys.addaudithook(audit)


_FORBIDDEN = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil.rmtree",
    "ctypes.dlopen",
}


def _expire(number: int, frame: Any) -> None:
    raise TooSlow(f"more than {INPUT_S} s of processor time")


def input_of(name: str, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a reader."""
    return mangled(READERS[name], seeds, Random(f"{seed}/{name}/{number}"))


def judge(reader: Reader, path: Path, limit_s: float = INPUT_S) -> str | None:
    """Feed one file: None if it was accepted, "" if it was refused, else what is wrong. 0 seconds: no limits."""
    _unsafe.clear()
    machine.reset_peak()
    before = machine.resident_bytes()
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        reader.use(_read(reader, path) if limit_s else reader.read(path), path)
        verdict: str | None = None
    except ExpertFlowError as error:
        verdict = _complaint(error)
    except (Exception, Unsafe, TooSlow):
        verdict = traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _unsafe:
        return f"unsafe: {_unsafe[0]}"
    grown = machine.peak_resident_bytes() - before
    if grown > INPUT_BYTES:
        return f"it took {machine.format_bytes(grown)} of memory"
    return verdict


def _read(reader: Reader, path: Path) -> Any:
    global _is_reading
    _is_reading = True
    try:
        return reader.read(path)
    finally:
        _is_reading = False


def _complaint(error: BaseException) -> str:
    """What is wrong with an error as a line for people; "" if nothing is."""
    line = one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"refused only when memory ran out: {line[:300]}"
        cause = cause.__cause__ or cause.__context__
    if not line:
        return "refused without a word"
    if not line.isprintable() or "\n" in line or len(line) > MESSAGE_CHARACTERS:
        return f"no line for a terminal: {line[:300]!r}"
    return ""


@dataclass(frozen=True)
class Run:
    """What is asked for; `folder` takes the inputs that failed."""

    readers: tuple[str, ...]
    seconds: float
    seed: int
    only: int | None
    folder: Path

    def counts(self) -> dict[str, Count]:
        """Feed every reader for its share of the time."""
        with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as seeds:
            return {name: self._fuzz(name, READERS[name].seeds(Path(seeds))) for name in self.readers}

    def _fuzz(self, name: str, seeds: Sequence[bytes]) -> Count:
        reader, count = READERS[name], Count()
        for data in seeds:
            self._one(reader, name, -1, data, Count())
        until = time.monotonic() + self.seconds / len(self.readers)
        start = time.monotonic()
        number = self.only or 0
        while time.monotonic() < until:
            self._one(reader, name, number, input_of(name, seeds, self.seed, number), count)
            number += 1
            if self.only is not None:
                break
        count.seconds = round(time.monotonic() - start, 1)
        return count

    def _one(self, reader: Reader, name: str, number: int, data: bytes, count: Count) -> None:
        path = self.folder / f"{name}-current{reader.suffix}"
        path.write_bytes(data)
        start, before = time.process_time(), machine.resident_bytes()
        # The first use of all imports modules and compiles kernels.
        verdict = judge(reader, path, 0 if number < 0 else INPUT_S)
        count.slowest_s = max(count.slowest_s, round(time.process_time() - start, 2))
        count.most_bytes = max(count.most_bytes, machine.peak_resident_bytes() - before)
        count.inputs += 1
        count.accepted += verdict is None
        count.refused += verdict == ""
        if number < 0 and verdict is not None:
            raise AssertionError(f"a valid {name} was refused: {verdict}")
        if verdict:
            kept = path.with_name(f"{name}-{self.seed}-{number}{reader.suffix}")
            kept.write_bytes(data)
            command = shlex.join(_again(name, self.seed, number))
            count.failures.append(f"{name} {number}\n{verdict}\n  the input: {kept}\n  again: {command}")
            print(f"FAIL {count.failures[-1]}", file=sys.stderr, flush=True)


def _again(name: str, seed: int, number: int) -> list[str]:
    return ["python", "tests/fuzz/fuzzer.py", "--readers", name, "--seed", str(seed), "--only", str(number)]


def _limit_address_space() -> None:
    """Nothing is allocated by the way: an array that is claimed but never written counts too."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = in_use + 4 * INPUT_BYTES  # heaps of threads are reserved generously
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _summary(run: Run, counts: Mapping[str, Count]) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "limits": {"seconds_per_input": INPUT_S, "bytes_per_input": INPUT_BYTES},
        "inputs": sum(count.inputs for count in counts.values()),
        "failures": sum(len(count.failures) for count in counts.values()),
        "readers": {name: {**asdict(count), "failures": len(count.failures)} for name, count in counts.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="over all readers (%(default)s)")
    parser.add_argument("--readers", default=",".join(READERS), help="of %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="feed this input alone")
    parser.add_argument("--folder", type=Path, help="where inputs that failed go; default: a new temporary folder")
    parser.add_argument("--out", type=Path, help="write the counts there as JSON")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="expertflow-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(tuple(options.readers.split(",")), options.seconds, options.seed, options.only, folder)
    signal.signal(signal.SIGPROF, _expire)
    warnings.simplefilter("ignore")
    _limit_address_space()
    watch()
    counts = run.counts()
    summary = _summary(run, counts)
    print(json.dumps(summary))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
