"""A small git repository with a runtime whose speed is virtual, and benchmarks of it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_RUNTIME = """\
import itertools
import random
from pathlib import Path

NOW_S = 0.0


def start():
    # Noise differs from process to process, and is the same whenever the whole check runs again.
    for number in itertools.count():
        try:
            Path(__file__).with_name(f"start-{{number}}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return random.Random(f"{{Path(__file__).parents[1].name}} {{number}}")


NOISE = start()


def work(seconds={seconds}):
    global NOW_S
    NOW_S += seconds * NOISE.uniform(1, 1.004)
    return {result}
"""
_CONFTEST = """\
import time

import pytest

import runtime

time.perf_counter = lambda: runtime.NOW_S  # what the worker measures with


def pytest_configure(config):
    config.addinivalue_line("markers", "paired: compared")
"""
_BENCHMARK = """\
import pytest

import runtime

pytestmark = pytest.mark.paired


def test_work(benchmark):
    benchmark.extra_info.update(of="tokens", count=10)
    benchmark.extra_info["tokens"] = benchmark.pedantic(runtime.work, rounds=3)
    benchmark.extra_info["kernels"] = getattr(runtime, "KERNELS", "plain")
"""


@dataclass(frozen=True)
class Repository:
    """At `path`."""

    path: Path

    def git(self, *arguments: str) -> str:
        """Run git there."""
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        command = ["git", *identity, "-C", str(self.path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def write(self, files: dict[str, str]) -> None:
        """Files by their path."""
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def commit(self, files: dict[str, str]) -> str:
        """Commit files, and everything else that has changed; the commit."""
        self.write(files)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "change")
        return self.git("rev-parse", "HEAD")

    def state(self) -> tuple[str, ...]:
        """Everything of the user's that must stay as it is."""
        asked = (["status", "--porcelain"], ["stash", "list"], ["ls-files", "--stage"], ["branch", "--all"])
        return tuple(self.git(*one) for one in (*asked, ["rev-parse", "HEAD"], ["worktree", "list"]))


def runtime(seconds: float = 0.1, result: str = "'abc'", more: str = "") -> str:
    """The source of a runtime whose `work` takes so long."""
    return _RUNTIME.format(seconds=seconds, result=result) + more


def make_repository(path: Path) -> Repository:
    """With one commit, of which nothing is changed."""
    path.mkdir()
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch", "main")
    repository.commit(
        {
            ".gitignore": "__pycache__/\n*.log\n",
            "pyproject.toml": '[project]\nname = "small"\ndependencies = ["numpy"]\n',
            "runtime/__init__.py": runtime(),
            "harness/__init__.py": "",
            "tests/benchmarks/conftest.py": _CONFTEST,
            "tests/benchmarks/test_speed.py": _BENCHMARK,
        }
    )
    return repository
