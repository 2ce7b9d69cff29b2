"""The table of families is complete, and its models are fit for exactness tests: finite, sensitive, reloadable."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, UNSUPPORTED, Family, decorated_families, is_decorated, realign
from packaging.version import Version
from safetensors import safe_open
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore")


def _parameter(family: Family) -> object:
    return pytest.param(family, id=family.name, marks=() if family.representative else pytest.mark.slow)


every_family = pytest.mark.parametrize("family", [_parameter(family) for family in FAMILIES])


@cache
def _model(family: Family, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Shared by the tests, which leave it as they found it."""
    model = family.build(dtype)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def _logits(family: Family, model: PreTrainedModel) -> torch.Tensor:
    return model(**family.inputs()).logits


def test_the_table_covers_every_decorated_family() -> None:
    assert {family.name for family in FAMILIES} == decorated_families()


def test_representatives_differ_in_every_structural_flag() -> None:
    if "muse_spark" not in decorated_families():
        pytest.skip("this transformers has no family with a norm inside its experts yet")
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    seen = defaultdict(set)
    for family in filter(lambda family: family.representative, FAMILIES):
        experts = next(filter(is_decorated, _model(family).modules()))
        for flag in flags:
            seen[flag].add(getattr(experts, flag))
    assert all(seen[flag] == {False, True} for flag in flags), dict(seen)


@every_family
def test_runs_with_sound_logits(family: Family) -> None:
    model = _model(family)
    if family.mode == "generate":
        output = model.generate(
            **family.inputs(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        logits = torch.stack(output.logits, dim=1)
    else:
        logits = _logits(family, model)
    assert logits.isfinite().all()
    assert logits.std(dim=-1).min() > 0.1, "logits hardly differ over the vocabulary"
    assert logits.std(dim=1).mean() > 0.05, "logits hardly differ between tokens"


@every_family
def test_every_layer_of_experts_counts(family: Family) -> None:
    """Two or more expert modules run, on at least half of their experts, and each one changes the logits."""
    model = _model(family)
    used = defaultdict(set)
    hooks = [
        module.register_forward_pre_hook(lambda module, args: used[module].update(args[1].unique().tolist()))
        for module in filter(is_decorated, model.modules())
    ]
    logits = _logits(family, model)
    for hook in hooks:
        hook.remove()
    assert len(used) >= 2
    assert len(set().union(*used.values())) >= 4
    for module in used:
        with torch.no_grad():
            kept = module.down_proj.clone()
            module.down_proj.zero_()
            changed = _logits(family, model)
            module.down_proj.copy_(kept)
        assert (changed - logits).abs().max() > 1e-3


@every_family
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_reloads_exactly(family: Family, layout: str, tmp_path: Path) -> None:
    if layout not in family.layouts:
        pytest.skip(f"transformers does not reload {family.name} from the {layout} layout")
    if family.name == "deepseek_v4" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("does not run in bfloat16 in transformers 5.17")
    model = _model(family, torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=layout == "hub")
    loaded, info = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    loaded.set_experts_implementation("eager")
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(_logits(family, realign(loaded)), _logits(family, model))


@pytest.mark.parametrize(("layout", "key"), [("hub", "experts.7.gate_proj.weight"), ("fused", "experts.gate_up_proj")])
def test_the_layouts_differ_on_disk(layout: str, key: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    _model(family).save_pretrained(tmp_path, save_original_format=layout == "hub")
    with safe_open(tmp_path / "model.safetensors", "pt") as checkpoint:
        assert f"model.layers.0.mlp.{key}" in checkpoint.keys()  # noqa: SIM118


def test_the_seed_decides_the_weights() -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    first, again, other = (family.build(torch.float32, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", UNSUPPORTED, ids=lambda family: family.name)
def test_unsupported_families_build_without_decorated_experts(family: Family) -> None:
    assert not any(map(is_decorated, family.build(torch.float32).modules()))
