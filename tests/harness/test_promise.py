"""Checking a profile again: what it is compared with, the verdicts, the command, and once for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from confirm_fakes import PEAK_BYTES, ok

from harness import check
from harness.checks.promise import Promise, configuration, default_of, judge
from harness.checks.report import Verdict
from harness.measure.stats import Ratio
from harness.measure.workload import load_workload
from harness.search.confirm import Contender, Segment
from harness.search.outcome import Kind, Outcome
from harness.search.trial import TrialSpec
from runtime import devices
from runtime.profile import MachineFacts, Profile, save_profile


@pytest.mark.parametrize(
    ("promised", "low", "high", "verdict"),
    [
        ((0.60, 0.70), 0.62, 0.68, "PASS"),
        ((0.60, 0.70), 0.50, 0.55, "PASS"),  # better than promised
        ((0.60, 0.70), 0.69, 0.80, "PASS"),  # overlaps, and still a gain
        ((0.60, 0.70), 0.72, 0.80, "REGRESSION"),  # a gain, but not the one that was promised
        ((0.60, 0.70), 1.05, 1.20, "REGRESSION"),
        ((0.60, 0.70), 0.65, 1.10, "INCONCLUSIVE"),
        (None, 0.98, 1.02, "PASS"),
        (None, 0.90, 1.20, "INCONCLUSIVE"),
        (None, 1.01, 1.03, "REGRESSION"),
        ((0.98, 1.04), 0.99, 1.03, "PASS"),  # of a profile that saves memory
        ((0.98, 1.04), 0.99, 1.08, "INCONCLUSIVE"),
        ((0.98, 1.04), 1.06, 1.08, "REGRESSION"),
    ],
)
def test_verdicts(promised: tuple[float, float] | None, low: float, high: float, verdict: str) -> None:
    told = None if promised is None else Ratio(0.65, *promised, 12)
    assert judge(Promise(told, None), Ratio((low + high) / 2, low, high, 12), 1 << 30)[0].name == verdict


def test_a_higher_peak_is_a_regression_however_fast() -> None:
    promise, fast = Promise(Ratio(0.65, 0.6, 0.7, 12), 1000), Ratio(0.5, 0.4, 0.6, 12)
    assert judge(promise, fast, 1030)[0] is Verdict.REGRESSION and judge(promise, fast, 1010)[0] is Verdict.PASS


_PROFILE: dict[str, Any] = {
    "cache.slots": 6,
    "cache.policy": "lru",
    "prefetch.depth": 0,
    "scheduler.kind": "route_overlap",
    "scheduler.group": 2,
    "compute.decode": "eager",
    "limits.max_memory_bytes": 2 << 30,
    "workload.context": 256,
    "workload.concurrency": 2,
    "workload.num_requests": 4,
    "workload.prompt_tokens": 12,
    "workload.output_tokens": 4,
    "fixed": ("cache.policy", "transfer.io_threads"),
    "transfer.io_threads": 1,
}
_EVIDENCE: dict[str, Any] = {
    "evidence.ratio": {"estimate": 0.65, "low": 0.6, "high": 0.7},
    "evidence.pairs": 12,
    "objectives.peak_memory_bytes": PEAK_BYTES,
    "evidence.baseline.peak_memory_bytes": PEAK_BYTES,
}


def _profile(**others: Any) -> Profile:
    return Profile.default().with_overrides({**_PROFILE, **others})


@pytest.mark.parametrize("profile", [Profile.default(), _profile(), _profile(**{"numerics": "lossy.substitute"})])
def test_the_configuration_is_everything_that_acts(profile: Profile) -> None:
    rebuilt = Profile.default().with_overrides({**configuration(profile, Path()), "fixed": profile.fixed})
    told = {"evidence": None, "objectives": None, "provenance": None, "match": None}
    assert rebuilt.model_dump(exclude={"workload"}) == profile.model_copy(update=told).model_dump(exclude={"workload"})


def test_an_artefact_is_found_beside_the_profile(tmp_path: Path) -> None:
    profile = Profile.default().with_overrides({"predictor.kind": "routing_path", "predictor.artifact": "p.npz"})
    assert configuration(profile, tmp_path)["predictor.artifact"] == str(tmp_path / "p.npz")


def test_the_default_has_the_same_limits_and_what_the_user_fixed() -> None:
    assert default_of(_profile()) == {
        "cache.policy": "lru",
        "transfer.io_threads": 1,
        "limits.max_memory_bytes": 2 << 30,
        "workload.context": 256,
    }
    assert default_of(Profile.default()) == {}


@dataclass
class Processes:
    """Stands in for `LiveTrial`; `answer` is of ("default" or "profile", how many runs it has had)."""

    answer: Callable[[str, int], Outcome]
    specs: dict[str, TrialSpec] = field(default_factory=dict)
    runs: list[tuple[str, Segment]] = field(default_factory=list)

    def __call__(self, runner: object, spec: TrialSpec, timeout_s: float) -> AbstractContextManager[Contender]:
        owner, name = self, "profile" if "cache.slots" in spec.overrides else "default"
        self.specs[name] = spec

        class One:
            def run(self, requests: Segment, /) -> Outcome:
                owner.runs.append((name, requests))
                return owner.answer(name, sum(one == name for one, _ in owner.runs))

        return nullcontext(One())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(home: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Processes]]:
    """Write a profile, run the command on made-up processes."""

    def run(answer: Callable[[str, int], Outcome], *arguments: str, **profile: Any) -> tuple[int, Processes]:
        processes = Processes(answer)
        monkeypatch.setattr("harness.search.live.LiveTrial", processes)
        told = {"workload.sha256": load_workload().sha256, "provenance.model": str(tiny_checkpoint), **_EVIDENCE}
        save_profile(_profile(**{**told, **profile}), home / "p.yaml")
        return check.main(["--profile", "p.yaml", *arguments]), processes

    return run


def _latency(ratio: float, peak: int = PEAK_BYTES) -> Callable[[str, int], Outcome]:
    return lambda name, number: ok(100.0 * ratio if name == "profile" else 100.0, peak)


def test_a_promise_that_is_kept_passes(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, processes = start(_latency(0.66), "--pairs", "6")
    out = capsys.readouterr().out
    assert code == 0 and "promised   latency 0.65 [0.60, 0.70]" in out and "measured   latency 0.66 [0.66, 0.66]" in out
    assert "97% interval, 6 pairs on 6 segments" in out and "verdict    pass: " in out
    assert [name for name, _ in processes.runs[:4]] == ["default", "profile", "profile", "default"]
    text = [requests for _, requests in processes.runs]
    assert text[0] == text[1] and len(set(text)) == 6
    assert [len(one.prompt_ids + one.output_ids) for one in text[0]] == [16] * 4
    for spec in processes.specs.values():
        assert spec.concurrency == 2 and spec.overrides["limits.max_memory_bytes"] == 2 << 30
        assert spec.requests and not {one.id for one in spec.requests} & {one.id for one in text[0]}


def test_a_gain_that_is_gone_is_a_regression(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_latency(1.0), "--json")[0] == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["verdict"] == "regression" and found["ratio"]["estimate"] == 1.0 and found["ratio"]["num_pairs"] == 20
    assert found["promised"]["ratio"]["high"] == 0.7 and found["confidence"] >= 0.95


def test_a_higher_peak_is_a_regression_on_the_command_line(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_latency(0.66, peak=PEAK_BYTES * 3 // 2))[0] == 1
    assert "peak memory 1.61 GB, promised 1.07 GB" in capsys.readouterr().out


def test_memory_of_a_gpu_is_called_so() -> None:
    told = {"match.device": "cuda:Some GPU", "objectives.peak_memory_bytes": 10**9}
    promised = Promise.of(Profile.default().with_overrides(told))
    verdict, why = judge(promised, Ratio(0.8, 0.7, 0.9, 6), 2 * 10**9)
    assert verdict is Verdict.REGRESSION and why == "peak GPU memory 2.00 GB, promised 1.00 GB"
    assert promised.describe(None, 10**9) == "no gain in latency, peak GPU memory 1.00 GB"


def test_noise_is_inconclusive(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = [0.4, 1.6, 0.5, 1.5, 0.6, 1.4]
    code, _ = start(lambda name, n: ok(100.0 * noisy[n - 1] if name == "profile" else 100.0), "--pairs", "6")
    out = capsys.readouterr().out
    assert code == 3 and "verdict    inconclusive: " in out and "more --pairs" in out


def test_a_profile_that_promises_nothing_must_cost_nothing(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_latency(1.0), **{"evidence.ratio": None})[0] == 0
    assert "promised   no gain in latency" in capsys.readouterr().out
    assert start(_latency(1.2), **{"evidence.ratio": None})[0] == 1


@pytest.mark.parametrize(("who", "code"), [("profile", 1), ("default", 3)])
def test_a_process_that_fails(start: Any, capsys: pytest.CaptureFixture[str], who: str, code: int) -> None:
    crash = Outcome(Kind.CRASH, "ended by SIGSEGV")
    assert start(lambda name, number: crash if name == who else ok(1.0))[0] == code
    assert f"the {who} ended with crash" in capsys.readouterr().out


def test_another_text_is_noted(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_latency(0.66), **{"workload.sha256": "0" * 64, "workload.name": "heldout"})[0] == 0
    assert "heldout is not the text" in capsys.readouterr().out


_ELSEWHERE = {"architecture": "Other", "layers": 2, "experts": 8, "top_k": 2, "expert_bytes": 1, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "profile", "said"),
    [
        (["--pairs", "5"], {}, "at least 6"),
        (["--workload", "missing.jsonl"], {}, "cannot be read"),
        (["--model", "."], {}, "not a checkpoint"),
        ([], {"provenance.model": None}, "--model"),
        ([], {"match.model": _ELSEWHERE}, "another model"),
        ([], {"workload.sha256": "0" * 64, "workload.name": "mine"}, "tuned on the workload mine"),
        ([], {"workload.prompt_tokens": 100_000}, "too little text|has text for"),
        (["--profile", "none.yaml"], {}, "cannot read the profile"),
    ],
)
def test_mistakes_are_one_line(
    start: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], profile: dict[str, Any], said: str
) -> None:
    code, processes = start(_latency(1.0), *arguments, **profile)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and not processes.runs
    assert any(each in error for each in said.split("|"))


@pytest.mark.slow
def test_for_real(home: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {**_EVIDENCE, "provenance.model": "elsewhere"}
    promise = {**told, "evidence.ratio": {"estimate": 1e-3, "low": 1e-4, "high": 2e-3}}
    save_profile(_profile(**promise), home / "p.yaml")
    code = check.main(["--profile", "p.yaml", "--model", str(tiny_checkpoint), "--pairs", "6", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    # Whatever the noise, a thousandfold gain is not there.
    assert (code, found["verdict"], found["num_segments"]) == (1, "regression", 6)
    assert found["ratio"]["num_pairs"] == 6 and found["peak_memory_bytes"] > 100e6


_GPU = {"match.device": "cuda:NVIDIA H200"}


def test_a_profile_of_a_gpu_cannot_be_judged_without_one(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, processes = start(_latency(0.66), **_GPU)
    out = capsys.readouterr().out
    assert code == Verdict.INVALID and not processes.runs
    assert "tuned on cuda:NVIDIA H200, and here is cpu" in out and "promised   latency 0.65" in out
    assert start(_latency(0.66), "--device", "cpu", **_GPU)[0] == 2
    assert "device: profile cuda:NVIDIA H200, here cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("named", [["--gpu", "0"], ["--device", "cuda:0"]])
def test_a_gpu_that_is_named_and_not_there(start: Any, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_latency(0.66), *named, **_GPU)[0] == 2
    assert capsys.readouterr().err.endswith(", or compute on the CPU (--device cpu)\n")
    assert check.main(named) == 2
    assert "does nothing here: it belongs to --profile" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "here"), [([], "cuda:NVIDIA H200"), (["--device", "cuda:1"], "cuda:Tesla T4")])
def test_both_are_measured_on_the_gpu(
    start: Any, named: list[str], here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(devices, "find_device", lambda name, profile: gpu)
    monkeypatch.setattr(devices, "device_facts", lambda device: MachineFacts(here, 80 << 30))
    monkeypatch.setattr(devices, "free_bytes", lambda device: 70 << 30)
    code, processes = start(_latency(0.66), "--pairs", "6", *named, **_GPU, **{"match.memory_total_bytes": 80 << 30})
    assert code == 0 and {spec.device for spec in processes.specs.values()} == {"cuda:1"}
    out = capsys.readouterr().out
    assert ("here cuda:Tesla T4" in out) == bool(named)
    assert ("--device cuda:1" in out) == bool(named)
