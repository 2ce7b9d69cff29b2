"""What `harness.quality` measures and writes, and the mistakes that it answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from harness import quality
from harness.measure.divergence import DivergenceMeter, compare
from harness.measure.workload import TokenRequest
from runtime.profile import Evidence, Profile, load_profile, save_profile

SIZES = ["--tokens", "20", "--prompt-tokens", "8", "--output-tokens", "8"]
LOSSY = ["--set", "numerics=lossy.substitute", "--set", "cache.slots=50%", "--set", "predictor.kind=none"]


def test_figures_computed_by_hand() -> None:
    meter = DivergenceMeter()
    half, quarter = math.log(0.5), math.log(0.25)
    meter.add(torch.tensor([half, half]), torch.tensor([quarter, math.log(0.75)]), 0)
    meter.add(torch.tensor([1.0, 3.0]), torch.tensor([11.0, 13.0]), 1)  # the same distribution
    found = meter.result()
    assert found.num_tokens == 2
    assert found.kl_nats == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2, rel=1e-6)
    own = -math.log(1 / (1 + math.exp(-2)))
    assert found.perplexity_exact == pytest.approx(math.exp((math.log(2) + own) / 2), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp((math.log(4) + own) / 2), rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(math.sqrt(2), rel=1e-6)
    assert (found.top1_agreement, found.max_logit_error) == (0.5, 10.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_model_does_not_differ_from_itself(dtype: torch.dtype) -> None:
    generator, meter = torch.Generator().manual_seed(0), DivergenceMeter()
    for _ in range(5):
        logits = (20 * torch.randn(1000, generator=generator)).to(dtype)
        logits[7] = -torch.inf
        meter.add(logits, logits.clone(), 5)
    found = meter.result()
    assert (found.kl_nats, found.perplexity_ratio, found.top1_agreement, found.max_logit_error) == (0.0, 1.0, 1.0, 0.0)


def _measure(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert quality.main([*map(str, arguments), *SIZES]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_an_exact_profile_costs_nothing(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _measure(capsys, "--model", tiny_checkpoint, "--set", "cache.slots=3", "--json")
    assert (found["kl_nats"], found["perplexity_ratio"], found["top1_agreement"]) == (0.0, 1.0, 1.0)
    assert (found["max_logit_error"], found["substituted_share"], found["num_tokens"]) == (0.0, 0.0, 20)
    assert found["slots"] == 3 and found["stats"]["num_misses"] > 0


def test_substitution_costs_what_it_costs(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _measure(capsys, "--model", tiny_checkpoint, *LOSSY)
    assert found["kl_nats"] > 0 and found["max_logit_error"] > 0
    decoded, layers, top_k = 20 - 3, 2, 2
    assert found["substituted_share"] == found["num_substituted"] / (decoded * layers * top_k) > 0
    assert _measure(capsys, "--model", tiny_checkpoint, *LOSSY)["kl_nats"] == found["kl_nats"], "it is reproducible"


def test_predictors_are_told_the_task_of_each_text(tiny_checkpoint: Path) -> None:
    texts = [TokenRequest("a", "english", (5, 6, 7), (8, 9)), TokenRequest("b", "python", (9, 8), (7, 6, 5))]
    seen: list[tuple[str, ...]] = []
    with runtime.load_reference(tiny_checkpoint) as exact, runtime.load(tiny_checkpoint) as ours:
        ours.on_pass(lambda passing: seen.append(passing.tasks))
        assert compare(exact, ours, texts).num_tokens == 5
    assert seen == [("english",) * 3, ("english",), ("python",) * 2, ("python",), ("python",)]


def test_the_exact_model_is_offloaded_where_it_does_not_fit(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = _measure(capsys, "--model", tiny_checkpoint, *LOSSY)
    monkeypatch.setattr("runtime.facts.RESIDENT_FACTOR", 1e9)
    assert quality.main(["--model", str(tiny_checkpoint), *LOSSY, *SIZES]) == 0
    captured = capsys.readouterr()
    assert "the exact one is offloaded too" in captured.err
    found = json.loads(captured.out.splitlines()[-1])
    assert [found[name] for name in ("kl_nats", "perplexity_exact")] == [whole["kl_nats"], whole["perplexity_exact"]]


def test_figures_are_written_into_the_profile(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    overrides = {"numerics": "lossy.substitute", "cache.slots": "50%", "predictor.kind": "none"}
    profile = Profile.default().with_overrides(overrides).model_copy(update={"evidence": Evidence(seed=7)})
    save_profile(profile, path)
    found = _measure(capsys, "--profile", path, "--model", tiny_checkpoint, "--write")
    evidence = load_profile(path).evidence
    names = ("kl_nats", "perplexity_ratio", "top1_agreement", "max_logit_error")
    assert evidence == Evidence(seed=7, **{name: found[name] for name in names})
    assert load_profile(path).model_copy(update={"evidence": profile.evidence}) == profile
    with runtime.load(path, tiny_checkpoint) as engine:
        assert any(f"{found['kl_nats']:.4g} nats" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "0"], "--tokens 0: at least 1"),
        (["--prompt-tokens", "1"], "--prompt-tokens 1: at least 2"),
        (["--prompt-tokens", "500", "--output-tokens", "13"], "above the 512"),
        (["--write"], "name it with --profile"),
        (["--profile", "p.yaml", "--write", "--set", "cache.slots=3"], "leave out one"),
        (["--profile", "gone.yaml"], "gone.yaml"),
        (["--workload", "gone.jsonl"], "gone.jsonl cannot be read"),
        (["--tokens", "10000000"], "ask for fewer or shorter requests"),
        (["--set", "numerics=lossy.substitut"], "lossy.substitute"),
        (["--model", "."], "is not a checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_profile(Profile.default(), tmp_path / "p.yaml")
    assert quality.main(["--model", str(tiny_checkpoint), *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out
