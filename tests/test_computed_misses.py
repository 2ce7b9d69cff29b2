"""Misses that are computed on the host, on the way of a GPU through the engine that this machine can run.

Products summed in another order differ by about the precision of their dtype times the root of the number of terms: a
float32 model of a few layers stays within 1e-4 of its logits' spread; a bfloat16 one, whose activations are rounded to
8 bits after each step, within a tenth. An expert that is lost, doubled or weighted wrongly is far beyond both.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family, realign
from late_streams import LateStreams, compute_late
from tiny import TOP_K, save_tiny
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import runtime
from harness import quality
from runtime import build, generate
from runtime.cache.miss import MissRates
from runtime.engine import Engine
from runtime.errors import UnsupportedModelError
from runtime.host_experts import HostLayer
from runtime.kernels import KERNELS, Arrival, HostArrival
from runtime.profile import Evidence, Profile, load_profile, save_profile

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
TEXT = "the quick brown fox jumps over the lazy dog, again and again."
EVEN = MissRates(copy_s=1.0, expert_s=1.0, token_s=0.0)  # a prompt is computed, too
COMPUTE = {"miss": "compute", "numerics": "equivalent", "prefetch.depth": 0}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_late(monkeypatch)


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: EVEN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def _logits(engine: Engine) -> torch.Tensor:
    """Of the end of a prompt, and of decode steps that are fed the text."""
    ids = engine.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model: Any = engine.model
    output = model(ids[:, :20], use_cache=True)
    found = [output.logits[0, -1]]
    for token in ids[0, 20:]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits[0, -1])
    return torch.stack(found).float()


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the spread of what is expected."""
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.usefixtures("late", "even")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize("how", [{}, {"miss": "auto"}, {"miss": "auto", "compute.host_share": 0.3}])
def test_results_stay_close_and_some_misses_are_computed(
    checkpoint: Path, how: dict[str, Any], kernel: str, dtype: torch.dtype
) -> None:
    overrides = {"cache.slots": 6, "compute.decode": kernel, "compute.prefill": kernel, **COMPUTE, **how}
    exact = {**overrides, "miss": "copy"}
    with runtime.load_reference(checkpoint, overrides=exact, dtype=dtype) as reference:
        expected = _logits(reference)
    with runtime.load(checkpoint, overrides=overrides, dtype=dtype) as engine:
        assert _far(_logits(engine), expected) < TOLERANCE[dtype]
        engine.check_integrity()
        cache = engine.stats().cache
        assert 0 < cache.num_computed < cache.num_misses
        assert engine.stats().num_loads == cache.num_misses - cache.num_computed + cache.num_prefetch_issued
        assert f"computed   {cache.num_computed}" in engine.stats().summary()


@pytest.mark.usefixtures("late", "even")
@pytest.mark.parametrize("slots", [1, TOP_K, 24])
def test_any_budget(checkpoint: Path, slots: int) -> None:
    overrides = {"cache.slots": slots, **COMPUTE, "miss": "auto", "prefetch.depth": 1}
    with runtime.load_reference(checkpoint, overrides=overrides, dtype=torch.float32) as reference:
        expected = _logits(reference)
    with runtime.load(checkpoint, overrides=overrides, dtype=torch.float32) as engine:
        for _ in range(2):
            assert _far(_logits(engine), expected) < TOLERANCE[torch.float32]
            engine.check_integrity()
        assert (engine.stats().cache.num_computed > 0) == (slots < 24), "free slots are filled first"


@pytest.mark.usefixtures("late")
def test_rates_are_measured_on_loading_and_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateStreams, "elapsed_s", lambda streams, begin, end: 0.5)
    with runtime.load(checkpoint, overrides={**COMPUTE, "cache.slots": 6, "miss": "auto"}) as engine:
        (note,) = (note for note in engine.notes if "a miss takes" in note)
        assert note.startswith("a miss takes 500 ms to copy and ")
        assert note.endswith("on 1 CPU thread, at the same time: of 8 misses in a layer, 0 are copied")
        assert any("was not measured; python -m harness.quality" in note for note in engine.notes)
        assert engine.stats().num_loads == 0
        _logits(engine)
        assert engine.stats().cache.num_computed > 0
        engine.check_integrity()


@pytest.mark.usefixtures("late", "even")
def test_what_was_measured_of_it_is_said(checkpoint: Path) -> None:
    evidence = Evidence(kl_nats=0.00125, max_logit_error=0.75)
    profile = Profile.default().with_overrides({**COMPUTE, "cache.slots": 6}).model_copy(update={"evidence": evidence})
    with runtime.load(profile, checkpoint) as engine:
        said = "by 0.00125 nats of KL divergence per token and up to 0.75 in a logit, as measured"
        assert any(note.startswith("numerics equivalent: ") and note.endswith(said) for note in engine.notes)


@pytest.mark.usefixtures("late")
def test_a_long_prompt_is_copied(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "rates_of", lambda pool, layers, device: MissRates(1.0, 0.5, 0.25))
    with runtime.load(checkpoint, overrides={**COMPUTE, "cache.slots": 6}) as engine:
        with torch.inference_mode():
            engine.model(torch.arange(1, 25).repeat(1, 8))
        assert engine.stats().cache.num_computed == 0 < engine.stats().cache.num_misses
        with torch.inference_mode():
            engine.model(torch.tensor([[3]]))
        assert engine.stats().cache.num_computed > 0


def test_on_the_cpu_misses_are_loaded(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _logits(reference)
    with runtime.load(checkpoint, overrides={**COMPUTE, "cache.slots": 6}) as engine:
        assert torch.equal(_logits(engine), expected)
        assert engine.profile.miss == "copy" and engine.stats().cache.num_computed == 0
        assert [note for note in engine.notes if "miss" in note] == [
            "miss compute is for a GPU: on the CPU misses are loaded, and results are exact"
        ]


# Biased and transposed, without a gate, normalised, computed or accumulated in float32, two shapes of experts, …
_VARIANTS = ("gpt_oss", "nemotron_h", "muse_spark", "openai_privacy_filter", "inkling2", "deepseek_v4", "qwen3_moe")


@torch.inference_mode()
def _outputs(model: Any, family: Family) -> torch.Tensor:
    output = model(**family.inputs())
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


@pytest.mark.usefixtures("late", "even")
@pytest.mark.parametrize("gemv_rows", [0, 100])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f.representative or f.name in _VARIANTS else pytest.mark.slow, id=f.name)
        for f in FAMILIES
    ],
)
def test_every_kind_of_expert(
    family: Family, kernel: str, gemv_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.host_experts.FEW_ROWS", gemv_rows)
    family.build(torch.float32).save_pretrained(tmp_path)
    pools = runtime.facts.describe(tmp_path).num_pools
    overrides = {"compute.prefill": kernel, "compute.decode": kernel, "cache.slots": max(2, pools), **COMPUTE}
    with runtime.load_reference(tmp_path, overrides=overrides) as reference:
        realign(reference.model)
        expected = _outputs(reference.model, family)
    with runtime.load(tmp_path, overrides=overrides) as engine:
        realign(engine.model)
        _outputs(engine.model, family)  # fills the slots
        before = engine.stats().cache
        assert _far(_outputs(engine.model, family), expected) < TOLERANCE[torch.float32]
        cache = engine.stats().cache
        assert cache.num_computed - before.num_computed == cache.num_misses - before.num_misses > 0
        engine.check_integrity()


def test_a_tensor_that_is_left_on_another_device_is_refused() -> None:
    module: Any = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=2))
    HostLayer(module, lambda num_routes: True)
    module.limit = torch.zeros(1, device="meta")
    with pytest.raises(UnsupportedModelError, match=r"limit of Qwen3MoeExperts is on meta .* set miss: copy"):
        HostLayer(module, lambda num_routes: True)


@pytest.mark.usefixtures("late", "even")
@pytest.mark.parametrize("stored", ["copy", "auto"])
def test_quality_is_measured_against_the_exact_model_and_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    path, sizes = tmp_path / "p.yaml", ["--tokens", "24", "--prompt-tokens", "8", "--output-tokens", "8"]
    profile = Profile.default().with_overrides({**COMPUTE, "cache.slots": 6, "miss": stored})
    save_profile(profile, path)
    asked = ["--profile", str(path), "--model", str(checkpoint), *sizes, "--device", "cpu", "--write"]
    assert quality.main(asked) == 0
    *text, last = capsys.readouterr().out.splitlines()
    found, evidence = json.loads(last), load_profile(path).evidence
    assert evidence is not None and (evidence.max_logit_error, evidence.kl_nats) == (
        found["max_logit_error"],
        found["kl_nats"],
    )
    assert (found["num_computed"] > 0) == (stored == "auto") and found["kl_nats"] < 0.01
    told = f"computed         {found['num_computed']} of {found['stats']['num_misses']} misses, on the CPU"
    assert (told in text) == (profile.numerics == "equivalent") and not any("substituted" in line for line in text)
    if stored == "copy":
        assert found["max_logit_error"] == 0.0


@pytest.mark.usefixtures("late", "even")
@pytest.mark.parametrize(
    ("more", "miss"),
    [
        (["--numerics", "equivalent"], "auto"),
        (["--numerics", "equivalent", "--set", "miss=compute"], "compute"),
        (["--numerics", "equivalent", "--profile", "compute"], "compute"),
        (["--numerics", "equivalent", "--profile", "copy"], "auto"),
        (["--numerics", "exact", "--profile", "compute"], "copy"),
        (["--profile", "compute"], "compute"),
        ([], "copy"),
    ],
)
def test_numerics_of_the_command_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    miss: str,
) -> None:
    for name in ("copy", "compute"):
        save_profile(Profile.default().with_overrides({**COMPUTE, "miss": name}), tmp_path / f"{name}.yaml")
    ran: list[Profile] = []
    notes = build._inexact_notes
    monkeypatch.setattr(build, "_inexact_notes", lambda profile: (ran.append(profile), notes(profile))[1])
    more = [str(tmp_path / f"{one}.yaml") if before == "--profile" else one for before, one in pairwise(["", *more])]
    asked = [
        "--model",
        str(checkpoint),
        "--prompt",
        "a cat",
        "--max-new-tokens",
        "4",
        "--set",
        "cache.slots=4",
        "--json",
    ]
    assert generate.main([*asked, *more]) == 0
    captured = capsys.readouterr()
    assert [profile.miss for profile in ran] == [miss]
    assert (json.loads(captured.out.splitlines()[-1])["num_computed"] > 0) == (miss != "copy")
    assert ("results differ from the exact model's" in captured.err) == (miss != "copy")


@pytest.mark.parametrize(
    ("changes", "threads"),
    [({}, 12), ({"fixed": ["compute.threads"]}, None), (COMPUTE, None)],
    ids=["tuned without", "fixed", "tuned with"],
)
def test_misses_are_computed_on_all_cores_unless_the_profile_was_tuned_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], threads: int | None
) -> None:
    monkeypatch.setattr("runtime.devices.is_gpu", lambda device: True)
    monkeypatch.setattr("runtime.machine.cpu_count", lambda: 12)
    save_profile(Profile.default().with_overrides(changes), tmp_path / "p.yaml")
    options = Namespace(numerics="equivalent", profile=tmp_path / "p.yaml")
    assert generate._with_numerics(options, None, {}).get("compute.threads") == threads
    assert generate._with_numerics(options, None, {"compute.threads": 3})["compute.threads"] == 3


def test_figures_of_what_runs_instead_are_not_written_into_a_profile(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    save_profile(Profile.default().with_overrides({"match.device": "cuda:Some GPU"}), path)
    before = path.read_bytes()
    asked = ["--profile", str(path), "--model", str(checkpoint), "--device", "cpu", "--write"]
    assert quality.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --write: something else runs here") and "cuda:Some GPU" in line
    assert path.read_bytes() == before


def test_what_only_a_gpu_has_is_said_on_the_cpu(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"tiers.host_bytes": "1MiB"}) as engine:
        assert any(note.startswith("tiers.host_bytes is for a GPU") for note in engine.notes)


def test_unknown_numerics_are_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", str(checkpoint), "--prompt", "a", "--numerics", "nearly"]) == 2
    assert "nearly" in capsys.readouterr().err.splitlines()[-1]


def test_one_token_that_chose_an_expert_twice() -> None:
    module: Any = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    hidden, choice = torch.randn(1, 8, generator=generator), np.array([[1, 1]])
    index, weights = torch.from_numpy(choice), torch.tensor([[0.25, 0.5]])
    mine = {name: parameter[1].detach() for name, parameter in module.named_parameters()}
    for name in ("eager", "grouped_mm"):
        results = []
        for on_host in (False, True):
            kernel = KERNELS[name](module, hidden, index, weights, [1], choice)
            kernel.host = HostLayer(module, lambda num_routes: True)
            add: Callable[[list[Any]], None] = kernel.add_from_host if on_host else kernel.add
            add([(HostArrival if on_host else Arrival)(1, mine)])
            results.append(kernel.result().detach())
        assert torch.allclose(*results, rtol=1e-5, atol=1e-6)
