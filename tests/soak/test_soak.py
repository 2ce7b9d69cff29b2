"""Many requests in a row: memory within the promise, none of it lost, tokens those of the resident model."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from harness import soak as command
from harness.measure.soak import LEAST_JUDGED, MOST_BYTES_PER_REQUEST, Sample, Soak, SoakResult, Trend, rounds
from runtime.profile import Profile, save_profile

MB = 1_000_000


def _samples(resident: Callable[[int], float], *, noise_bytes: float = 2 * MB) -> tuple[Sample, ...]:
    """Of 1,000 requests; the caches of a real process fill within the first 200."""
    rng = np.random.default_rng(0)
    return tuple(
        Sample(
            n, int(r := 500 * MB + min(n, 200) * 0.2 * MB + resident(n) + rng.normal(scale=noise_bytes)), int(r), 9, 8
        )
        for n in range(0, 1001, 25)
    )


def _result(**changes: object) -> SoakResult:
    samples = _samples(lambda n: 0.0)
    found = {"promise_bytes": 600 * MB, "samples": samples, "different": (), "integrity": "", "facts": {}, **changes}
    return SoakResult(**found)  # type: ignore[arg-type]


def test_filling_caches_and_noise_are_no_growth() -> None:
    assert Trend.of(_samples(lambda n: 0.0)).is_level
    assert not _result().failures and _result().as_dict()["passed"]


@pytest.mark.parametrize(
    "grown",
    [lambda n: 2 * MOST_BYTES_PER_REQUEST * n, lambda n: 40 * MB * (n >= 700)],
    ids=["with each request", "at once"],
)
def test_growth_is_seen(grown: Callable[[int], float]) -> None:
    found = _result(samples=_samples(grown), promise_bytes=2000 * MB)
    assert [failure for failure in found.failures if "grows" in failure] == found.failures != []


def test_too_few_requests_say_nothing_about_growth() -> None:
    """Caches that fill grow as much; what is said is not judged."""
    few = tuple(one for one in _samples(lambda n: 0.2 * MB * n) if one.num_requests <= LEAST_JUDGED - 25)
    found = _result(samples=few, promise_bytes=2000 * MB)
    assert not found.trend.is_level and not found.failures and not found.as_dict()["growth_is_judged"]
    assert f"judged from {LEAST_JUDGED} requests on" in found.describe()


def test_everything_else_that_is_promised() -> None:
    more = _samples(lambda n: 0.0)
    assert "promised" in _result(promise_bytes=400 * MB).failures[0]
    assert "requests differ" in _result(different=("7",)).failures[0]
    assert "contradicts" in _result(integrity="slot 3").failures[0]
    assert "files are open" in _result(samples=(*more[:-1], more[-1]._replace(num_files=12))).failures[0]
    assert "threads are open" in _result(samples=(*more[:-1], more[-1]._replace(num_threads=9))).failures[0]
    assert "FAILED" in _result(different=("7",)).describe() and "FAILED" not in _result().describe()


def test_the_requests_are_a_function_of_the_seed() -> None:
    soak = Soak("m", num_requests=300, seed=3)
    first = list(rounds(soak))
    pieces = list(chain.from_iterable(first))
    assert first == list(rounds(soak)) != list(rounds(Soak("m", num_requests=300, seed=4)))
    assert len(pieces) == 300 and 1 < max(map(len, first)) <= soak.batch
    assert 50 < sum(len(one) for one in first if len(one) == 1) < 250
    assert {piece.prompt_tokens for piece in pieces} <= set(range(4, 97))
    assert {piece.output_tokens for piece in pieces} == set(range(1, 9))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--requests", "10"], "say nothing about memory"),
        (["--prompt-tokens", "9-4"], "not of the form 4-96"),
        (["--max-memory", "much"], "is not a size"),
        (["--profile", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_of_the_command(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_requests(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--requests", "1000", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["passed"], found["failures"]
    assert found["num_different"] == 0 and found["peak_bytes"] <= found["promise_bytes"]
    assert found["slots"] < 0.3 * 8 * 32


def test_a_profile_names_its_checkpoint_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(tmp_path))
    (tmp_path / "mine").mkdir()
    save_profile(Profile.default().with_overrides({"provenance.model": "cache:mine"}), tmp_path / "p.yaml")
    assert command._soak(command._parser().parse_args(["--profile", str(tmp_path / "p.yaml")])).model == str(
        tmp_path / "mine"
    )


def test_a_profile_of_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    save_profile(Profile.default().with_overrides({"match.device": "cuda:NVIDIA H200"}), path)
    assert command.main(["--profile", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "promises memory of the GPU, and this watches the host's" in error
