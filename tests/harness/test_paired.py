"""The paired check: its order, its failures, its verdicts, on processes of a small repository with a virtual clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from paired_fakes import Repository, make_repository, runtime

from harness.checks import pairs
from harness.checks.decision import NUM_PAIRS, NUM_RESTARTS
from harness.checks.paired import check_paired, report_of
from harness.checks.pairs import PairedRun
from harness.checks.report import Report, Verdict
from harness.checks.side import Ended, Sample, Side, SideFailed, Timeouts
from harness.checks.worktrees import Tree
from runtime.errors import UsageError

ROOT = Path(__file__).parents[2]


class Calm:
    """Surroundings in which nothing happens but at the pairs whose numbers are in `noisy`."""

    noisy: Sequence[int] = ()

    def __init__(self) -> None:
        self._seen = -1

    def watch(self) -> Self:
        return self

    def end(self, cpu_s: float, wait_share: float | None) -> Self:
        return self

    def changed(self, now: object) -> str:
        self._seen += 1
        return "others took all cores" if self._seen in self.noisy else ""

    def as_dict(self) -> dict[str, Any]:
        return {"foreign_share": 0.5}


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Calm]]:
    """Whatever this machine does beside the tests."""
    monkeypatch.setattr(pairs, "Surroundings", Calm)
    yield Calm
    Calm.noisy = ()


class Fake:
    """A side without a process. `speeds[name]` is what a run takes; a `SideFailed` instead is raised."""

    def __init__(self, side: str, speeds: dict[str, float | SideFailed], log: list[str], start: int) -> None:
        self.side, self.speeds, self.log, self.start = side, speeds, log, start
        self.collected, self.uncollected = tuple(speeds), dict[str, str]()
        self.info: dict[str, Any] = {"of": "tokens", "count": 10, "tokens": "abc"}
        self.peak_bytes = 1000
        self.begun = ""

    def __enter__(self) -> Self:
        self.log.append(f"start {self.side}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.append(f"close {self.side}")

    def ready(self) -> None:
        pass

    def begin(self, name: str) -> None:
        self.begun = name
        speed = self.speeds[name]
        if isinstance(speed, SideFailed) and speed.kind in ("missing", "skipped", "error"):
            raise speed

    def sample(self) -> Sample:
        self.log.append(self.side[0].upper())
        speed = self.speeds[self.begun]
        if isinstance(speed, SideFailed):
            raise speed
        noise = 1 + 0.001 * (len(self.log) * 7 % 5)
        return Sample(speed * noise, speed, 10, 0)

    def end(self) -> Ended:
        return Ended(self.info, self.peak_bytes)


Speeds = dict[str, float | SideFailed]


class Runner:
    """Runs pairs of fakes. `change` alters each fake when it starts."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lines: list[str] = []
        self.change: Callable[[Fake], None] = lambda fake: None
        self._starts = {"base": 0, "head": 0}

    def __call__(self, base: Speeds, head: Speeds, num_pairs: int = NUM_PAIRS, only: Sequence[str] = ()) -> PairedRun:
        def open_side(side: str) -> AbstractContextManager[pairs.Asked]:
            fake = Fake(side, {"base": base, "head": head}[side], self.log, self._starts[side])
            self._starts[side] += 1
            self.change(fake)
            return fake

        run = PairedRun(open_side, num_pairs, self.lines.append)
        run.run(only)
        return run


def _trees() -> dict[str, Tree]:
    return {side: Tree(side, f"{side}-commit", Path(side), sys.executable) for side in ("base", "head")}


def _report(run: PairedRun, *, is_aa: bool = False) -> Report:
    return report_of(run, _trees(), margin=0.02, is_aa=is_aa, notes=(), reproduce="again")


def _found(report: Report) -> dict[str, tuple[Verdict, str]]:
    return {one.name: (one.verdict, one.reason) for one in report.findings}


@pytest.fixture
def runner() -> Runner:
    return Runner()


def test_sides_take_turns(runner: Runner) -> None:
    run = runner({"decode": 0.1}, {"decode": 0.1})
    starts = "".join(one for one in runner.log if len(one) == 1)
    assert starts[:10] == "BHHBBHHBBH" and starts[10:20] == "HBBHHBBHHB"
    assert runner.log.count("start base") == runner.log.count("close head") == NUM_RESTARTS
    samples = run.metrics["decode"].samples()
    assert samples.group == [pair // 5 for pair in range(NUM_PAIRS)]
    assert runner.lines[-1].startswith(f"decode {NUM_PAIRS}/{NUM_PAIRS}: base 0.1")


@pytest.mark.parametrize(("num_pairs", "groups"), [(2, [0, 1]), (10, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3])])
def test_few_pairs_are_shared_evenly(runner: Runner, num_pairs: int, groups: list[int]) -> None:
    run = runner({"decode": 0.1}, {"decode": 0.1}, num_pairs)
    assert run.metrics["decode"].samples().group == groups


def test_repeats_are_of_one_side(runner: Runner) -> None:
    run = runner({"decode": 0.1}, {"decode": 0.2}, 20)
    repeats = run.metrics["decode"].repeats()
    assert len(repeats.base) == 16  # four in each start of five pairs
    for one, other in zip(repeats.base, repeats.head, strict=True):
        assert one == pytest.approx(other, rel=0.01)
    assert {round(one, 1) for one in repeats.base} == {0.1, 0.2}


def test_verdicts_and_what_is_told(runner: Runner) -> None:
    report = _report(runner({"decode": 0.1, "prefill": 0.3}, {"decode": 0.11, "prefill": 0.3}))
    found = _found(report)
    assert found["decode"][0] is Verdict.REGRESSION and found["prefill"][0] is Verdict.PASS
    assert found["decode"][1].endswith("; 99.8 -> 90.73 tokens/s")
    assert found["tokens"] == (Verdict.PASS, "equal in 2 benchmarks")
    assert found["peak memory"][0] is Verdict.PASS
    figures = report.as_dict()
    assert len(figures["samples"]["decode"]["head"]) == NUM_PAIRS and figures["head"]["commit"] == "head-commit"
    assert figures["samples"]["decode"]["info"] == {"of": "tokens", "count": 10}
    assert report.facts == (("base", "base-commit"), ("head", "head-commit"))


def test_only_some(runner: Runner) -> None:
    speeds: Speeds = {"decode": 0.1, "prefill": 0.3}
    assert list(runner(speeds, speeds, 10, only=["prefill"]).metrics) == ["prefill"]
    with pytest.raises(UsageError, match="no benchmark decoding: there are decode, prefill"):
        runner(speeds, speeds, 10, only=["decoding"])
    assert runner.log[-2:] == ["close head", "close base"]


def test_disturbed_pairs_are_left_out(runner: Runner, calm: type[Calm]) -> None:
    calm.noisy = range(0, 60, 6)
    run = runner({"decode": 0.1}, {"decode": 0.1})
    metric = run.metrics["decode"]
    assert len(metric.kept) == 50 and len(metric.as_dict()["disturbed"]) == 10
    report = _report(run)
    assert _found(report)["decode"][0] is Verdict.PASS
    assert report.notes == ("10 of 60 pairs were disturbed; they are left out",)
    assert "disturbed: others took all cores" in runner.lines[0]


def test_too_many_disturbed_pairs_say_nothing(runner: Runner, calm: type[Calm]) -> None:
    calm.noisy = range(0, 60, 4)
    report = _report(runner({"decode": 0.1}, {"decode": 0.2}))
    assert report.verdict is Verdict.INVALID
    assert "15 of 60 pairs were disturbed, such as: others took all cores" in _found(report)["surroundings"][1]


@pytest.mark.parametrize("kind", ["crash", "hang", "error"])
@pytest.mark.parametrize(("side", "verdict"), [("base", Verdict.INVALID), ("head", Verdict.REGRESSION)])
def test_a_side_that_fails_is_left_behind(runner: Runner, kind: str, side: str, verdict: Verdict) -> None:
    speeds: dict[str, Speeds] = {one: {"load": 0.1, "decode": 0.1, "prefill": 0.1} for one in ("base", "head")}
    speeds[side]["decode"] = SideFailed(side, kind, "ended by SIGSEGV")
    run = runner(speeds["base"], speeds["head"])
    found = _found(_report(run))
    assert found["decode"][0] is verdict and found["decode"][1].endswith("ended by SIGSEGV")
    assert found["load"][0] is found["prefill"][0] is Verdict.PASS
    assert len(run.metrics["prefill"].pairs) == NUM_PAIRS  # by other processes
    assert runner.log.count("start base") == NUM_RESTARTS + 1


def test_what_the_base_cannot_run_is_new(runner: Runner) -> None:
    missing = SideFailed("base", "missing", "ImportError: cannot import name 'serve'")
    run = runner({"decode": 0.1, "serving": missing}, {"decode": 0.1, "serving": 0.1})
    verdict, reason = _found(_report(run))["serving"]
    assert verdict is Verdict.PASS and reason.startswith("new, not compared: the base lacks what it needs (ImportErr")
    assert runner.log.count("start base") == NUM_RESTARTS  # goes on with the same processes


def test_what_neither_can_run(runner: Runner) -> None:
    missing = {side: SideFailed(side, "missing", "AttributeError: no") for side in ("base", "head")}
    run = runner({"decode": missing["base"]}, {"decode": missing["head"]})
    report = _report(run)
    assert _found(report)["decode"] == (Verdict.REGRESSION, "the head fails: AttributeError: no")
    assert _found(report)["pairs"] == (Verdict.INVALID, "nothing could be compared")


def test_what_is_skipped(runner: Runner) -> None:
    skip = {side: SideFailed(side, "skipped", "no CUDA device") for side in ("base", "head")}
    ok: Speeds = {"decode": 0.1}
    found = _found(_report(runner({**ok, "copy": skip["base"]}, {**ok, "copy": skip["head"]})))
    assert found["copy"] == (Verdict.PASS, "skipped, not compared: no CUDA device")
    found = _found(_report(runner({**ok, "copy": 0.1}, {**ok, "copy": skip["head"]})))
    assert found["copy"] == (Verdict.REGRESSION, "the head skips it: no CUDA device")


@pytest.mark.parametrize(("side", "verdict"), [("base", Verdict.INVALID), ("head", Verdict.REGRESSION)])
def test_a_side_that_does_not_start(runner: Runner, side: str, verdict: Verdict) -> None:
    def change(fake: Fake) -> None:
        def ready() -> None:
            raise SideFailed(fake.side, "crash", "ended with code 1")

        if fake.side == side:
            fake.ready = ready  # type: ignore[method-assign]

    runner.change = change
    report = _report(runner({"decode": 0.1}, {"decode": 0.1}))
    assert _found(report)["benchmarks"] == (verdict, f"the {side} crashes: ended with code 1")
    assert report.verdict is verdict and runner.log == ["start base", "start head", "close head", "close base"]


def test_a_file_that_the_head_cannot_load(runner: Runner) -> None:
    def change(fake: Fake) -> None:
        fake.uncollected = {"test_speed.py": "SyntaxError: invalid syntax"}

    runner.change = change
    found = _found(_report(runner({"decode": 0.1}, {"decode": 0.1})))
    assert found["test_speed.py"] == (Verdict.REGRESSION, "the head cannot load it: SyntaxError: invalid syntax")


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        ({"tokens": "a"}, {"tokens": "a"}, Verdict.PASS),
        ({"tokens": "a"}, {"tokens": "b"}, Verdict.REGRESSION),
        ({"tokens": "a", "kernels": "x"}, {"tokens": "b", "kernels": "y"}, Verdict.PASS),
        ({"tokens": "a", "kernels": "x"}, {"tokens": "b", "kernels": "x"}, Verdict.REGRESSION),
        ({}, {}, Verdict.PASS),
    ],
)
def test_tokens(runner: Runner, base: dict[str, Any], head: dict[str, Any], verdict: Verdict) -> None:
    runner.change = lambda fake: setattr(fake, "info", {"base": base, "head": head}[fake.side])
    assert _found(_report(runner({"decode": 0.1}, {"decode": 0.1})))["tokens"][0] is verdict


def test_a_base_that_does_not_agree_with_itself(runner: Runner) -> None:
    runner.change = lambda fake: setattr(fake, "info", {"tokens": fake.start % 2 if fake.side == "base" else 0})
    assert _found(_report(runner({"decode": 0.1}, {"decode": 0.1})))["tokens"][0] is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("head_bytes", "verdict"),
    [
        (lambda start: 1010, Verdict.PASS),
        (lambda start: 1030, Verdict.REGRESSION),
        (lambda start: 1000 if start == 0 else 1030, Verdict.INCONCLUSIVE),
        (lambda start: 1030 if start < 4 else 1000, Verdict.PASS),
    ],
)
def test_peak_memory(runner: Runner, head_bytes: Callable[[int], int], verdict: Verdict) -> None:
    runner.change = lambda fake: setattr(fake, "peak_bytes", 1000 if fake.side == "base" else head_bytes(fake.start))
    assert _found(_report(runner({"decode": 0.1}, {"decode": 0.1})))["peak memory"][0] is verdict


def test_the_base_beside_itself(runner: Runner) -> None:
    report = _report(runner({"decode": 0.1}, {"decode": 0.1}), is_aa=True)
    found = _found(report)
    assert list(found) == ["decode"] and found["decode"][0] is Verdict.PASS and "quiet enough" in found["decode"][1]
    crash = SideFailed("head", "crash", "ended by SIGSEGV")
    assert _report(runner({"decode": 0.1}, {"decode": crash}), is_aa=True).verdict is Verdict.INVALID


def test_the_base_beside_itself_need_not_run_what_is_new(runner: Runner) -> None:
    new: Speeds = {"decode": 0.1, "serving": SideFailed("head", "missing", "ImportError: no serve")}
    runner.change = lambda fake: setattr(fake, "uncollected", {"test_new.py": "ImportError: no new"})
    report = _report(runner(new, new), is_aa=True)
    found = _found(report)
    assert report.verdict is Verdict.PASS and list(found) == ["test_new.py", "serving", "decode"]
    for name in ("test_new.py", "serving"):
        assert found[name][1].startswith("not compared, new since the base: ")


# From here on with real processes.


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "repository")


def _check(repository: Repository, base: str = "HEAD", **options: Any) -> Report:
    return check_paired(base, **{"num_pairs": 10, "root": repository.path, **options})


@pytest.mark.parametrize(("seconds", "verdict"), [(0.1, Verdict.PASS), (0.11, Verdict.REGRESSION)])
def test_a_change_that_is_not_committed(repository: Repository, seconds: float, verdict: Verdict) -> None:
    repository.write({"runtime/__init__.py": runtime(seconds) + "# changed\n"})
    before = repository.state()
    lines: list[str] = []
    report = _check(repository, on_block=lines.append)
    found = _found(report)
    assert found["work"][0] is verdict and found["tokens"] == (Verdict.PASS, "equal in 1 benchmarks")
    assert report.verdict is verdict and len(lines) == 10
    assert report.reproduce == "python -m harness.check --base HEAD --pairs 10 --margin 2%"
    assert report.figures["head"]["commit"].endswith("+") and len(report.figures["peak_resident_bytes"]["base"]) == 4
    assert repository.state() == before


def test_the_base_beside_itself_is_the_base(repository: Repository) -> None:
    repository.write({"runtime/__init__.py": runtime(0.2)})
    report = _check(repository, is_aa=True)
    assert report.reproduce.endswith("--aa") and list(_found(report)) == ["work"]
    assert "base/base" in _found(report)["work"][1]
    samples = report.figures["samples"]["work"]
    assert [*samples["base"], *samples["head"]] == pytest.approx([0.1] * 20, rel=0.01)


def test_an_installed_copy_does_not_win(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed/runtime").mkdir(parents=True)
    (tmp_path / "installed/runtime/__init__.py").write_text(runtime(9.0))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    report = _check(repository, num_pairs=2)
    assert max(report.figures["samples"]["work"]["base"]) < 1.0


def test_a_side_that_measures_another_tree_is_noticed(repository: Repository, tmp_path: Path) -> None:
    elsewhere = tmp_path / "installed"
    (elsewhere / "runtime").mkdir(parents=True)
    (elsewhere / "runtime/__init__.py").write_text(runtime(0.1))
    conftest = (repository.path / "tests/benchmarks/conftest.py").read_text()
    first = f"import sys\nsys.path.insert(0, {str(elsewhere)!r})\n"
    repository.write({"tests/benchmarks/conftest.py": first + conftest})
    report = _check(repository, num_pairs=2)
    verdict, reason = _found(report)["work"]
    assert verdict is Verdict.INVALID and report.verdict is Verdict.INVALID
    assert reason.startswith(f"the base measures runtime of {elsewhere}/runtime/__init__.py, not ")


_NEW = """
import pytest
import runtime

@pytest.mark.paired
def test_new(benchmark):
    benchmark(runtime.better)

@pytest.mark.paired
def test_unlike(benchmark):
    benchmark(runtime.work, surely=1)

def test_unmarked(benchmark):
    benchmark(runtime.work)
"""
_NEWER = """
import pytest
from runtime import best

@pytest.mark.paired
def test_newest(benchmark):
    benchmark(best)
"""


def test_benchmarks_that_the_base_cannot_run(repository: Repository) -> None:
    repository.write(
        {
            "runtime/__init__.py": runtime().replace("work(seconds=0.1", "work(seconds=0.1, surely=0")
            + "best = better = work\n",
            "tests/benchmarks/test_new.py": _NEW,
            "tests/benchmarks/test_newer.py": _NEWER,
        }
    )
    report = _check(repository)
    found = _found(report)
    assert report.verdict is Verdict.PASS and set(report.figures["samples"]) == {"work"}
    for name, why in (("new", "has no attribute 'better'"), ("unlike", "surely"), ("newest", "cannot import name 'be")):
        assert found[name][0] is Verdict.PASS and found[name][1].startswith("new, not compared"), found
        assert why in found[name][1]
    assert "unmarked" not in found


def test_a_head_that_crashes(repository: Repository) -> None:
    crash = "import os, sys\nprint('the disk is gone', file=sys.stderr, flush=True)\nos._exit(7)"
    repository.write({"runtime/__init__.py": runtime(more=f"def work():\n    exec({crash!r})\n")})
    verdict, reason = _found(_check(repository, num_pairs=2))["work"]
    assert verdict is Verdict.REGRESSION
    assert reason.startswith("the head crashes: ended with code 7") and "the disk is gone" in reason


def test_a_head_that_raises(repository: Repository) -> None:
    repository.write({"runtime/__init__.py": runtime(more="def work():\n    raise OSError('no disk')\n")})
    verdict, reason = _found(_check(repository, num_pairs=2))["work"]
    assert verdict is Verdict.REGRESSION and reason == "the head fails: OSError: no disk"


def test_a_process_that_hangs(repository: Repository, tmp_path: Path) -> None:
    repository.write({"runtime/__init__.py": runtime(more="def work():\n    import time\n    time.sleep(600)\n")})
    tree = Tree("head", "x", repository.path, sys.executable)
    timeouts = Timeouts(start_s=60, begin_s=0.5, sample_s=60)
    with Side(tree, repository.path, repository.path / "tests/benchmarks", tmp_path / "log", timeouts) as side:
        side.ready()
        with pytest.raises(SideFailed, match="no answer within") as failed:
            side.begin("work")
    assert failed.value.kind == "hang" and failed.value.side == "head"


def test_other_tokens_lose(repository: Repository) -> None:
    repository.write({"runtime/__init__.py": runtime(0.01, result="'abd'")})
    report = _check(repository)
    assert report.verdict is Verdict.REGRESSION and _found(report)["work"][0] is Verdict.PASS
    assert _found(report)["tokens"] == (Verdict.REGRESSION, "work: the head computes other tokens than the base")


def test_no_benchmarks(repository: Repository) -> None:
    repository.git("rm", "-rq", "tests")
    with pytest.raises(UsageError, match="there are no benchmarks in tests/benchmarks"):
        _check(repository)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_leaves_nothing(repository: Repository, tmp_path: Path, number: signal.Signals) -> None:
    repository.commit({"runtime/__init__.py": runtime(more="def work():\n    import time\n    time.sleep(600)\n")})
    before = repository.state()
    code = (
        "import sys; from pathlib import Path; from harness.checks.paired import check_paired\n"
        f"check_paired('HEAD', root=Path({str(repository.path)!r}))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: list(tmp_path.glob("expertflow-check-*/head/**/*.pyc")))
        process.send_signal(number)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
    assert repository.state() == before and not list(tmp_path.glob("expertflow-check-*"))


def _wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.parametrize("patch", ["planted-slowdown", "planted-miss"])
def test_what_is_planted_by_hand_still_applies(patch: str) -> None:
    """The patches with which the checks are tried on a clone."""
    command = ["git", "apply", "--check", str(ROOT / "tests" / "data" / f"{patch}.patch")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the clone that the sources are in")
def test_for_real() -> None:
    lines: list[str] = []
    report = check_paired("HEAD", num_pairs=2, only=["decode", "load"], on_block=lines.append)
    assert len(lines) == 4 and set(report.figures["samples"]) == {"decode", "load"}, report.describe()
    decode = report.figures["samples"]["decode"]
    assert len(decode["base"]) == len(decode["head"]) == 2 and decode["group"] == [0, 1]
    assert min(*decode["base"], *decode["head"]) > 1e-3 and decode["info"] == {"of": "tokens", "count": 24}
    assert {"decode", "load", "tokens", "peak memory"} <= set(_found(report))
