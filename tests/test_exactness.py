"""Offloaded equals resident, to the bit: every family, kernel, layout and budget.

The reference is transformers' own implementation of the kernel (eager, grouped_mm); gemv is ours, so there the resident
model runs through it as well. Prefill and cached decode where the family generates, one forward otherwise; multimodal
wrappers are not tested. The representative families run by default, all of them in `make test-all`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, UNSUPPORTED, Family, realign
from transformers import PreTrainedModel

import runtime
from runtime.engine import Engine
from runtime.errors import TraceError, UnsupportedModelError
from runtime.facts import ModelFacts, describe, top_k_of
from runtime.kernels import KERNELS as KERNEL_CLASSES
from runtime.model import model_class
from runtime.vocabulary import Phase

KERNELS = ("eager", "grouped_mm", "gemv")
NEW_TOKENS = 4


def _outputs(model: PreTrainedModel, family: Family) -> list[torch.Tensor]:
    """Logits of the prompt's last token and of each decode step; or the one forward's output."""
    inputs = family.inputs()
    with torch.inference_mode():
        if family.mode == "forward":
            output = model(**inputs)
            return [output.logits if hasattr(output, "logits") else output.last_hidden_state]
        generated = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return list(generated.logits)


def _budgets(facts: ModelFacts) -> dict[str, int]:
    """Slots by name; one per pool is the least there can be."""
    total = facts.num_experts_total
    slots = {"one": 1, "top_k": facts.top_k, "quarter": total // 4, "all": total}
    return {name: max(count, facts.num_pools) for name, count in slots.items()}


def _use(engine: Engine, kernel: str) -> None:
    engine.kernels[Phase.PREFILL] = KERNEL_CLASSES["eager" if kernel == "gemv" else kernel]
    engine.kernels[Phase.DECODE] = KERNEL_CLASSES[kernel]


def _references(checkpoint: Path, family: Family) -> dict[str, list[torch.Tensor]]:
    """What each kernel computes with the whole model in memory."""
    with runtime.load_reference(checkpoint) as engine:
        # `from_pretrained` leaves tensors where they lie in the mapped file, and MKL's float32 results depend on that.
        realign(engine.model)
        found = {}
        for kernel in ("eager", "grouped_mm"):
            engine.model.set_experts_implementation(kernel)
            found[kernel] = _outputs(engine.model, family)
        engine.model.set_experts_implementation("expertflow")
        _use(engine, "gemv")
        found["gemv"] = _outputs(engine.model, family)
    return found


def _check(family: Family, dtype: torch.dtype, folder: Path) -> None:
    model = family.build(dtype)
    references: dict[str, list[torch.Tensor]] = {}
    for layout in family.layouts:
        checkpoint = folder / layout
        model.save_pretrained(checkpoint, save_original_format=layout == "hub", max_shard_size="200KB")
        references = references or _references(checkpoint, family)
        for budget, slots in _budgets(describe(checkpoint)).items():
            overrides = {"cache.slots": slots, "prefetch.depth": 1, "prefetch.count": 2}
            with runtime.load(checkpoint, overrides=overrides) as engine:
                realign(engine.model)
                for kernel in KERNELS:
                    _use(engine, kernel)
                    where = f"{family.name} {dtype} {layout} {budget} {kernel}"
                    for step, (ours, theirs) in enumerate(
                        zip(_outputs(engine.model, family), references[kernel], strict=True)
                    ):
                        assert torch.equal(ours, theirs), f"{where} step {step}: {(ours - theirs).abs().max()}"
                assert engine.stats().cache.num_lookups > 0, f"{family.name}: nothing went through the cache"
                engine.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f.representative else pytest.mark.slow, id=f.name) for f in FAMILIES],
)
def test_offloaded_equals_resident_to_the_bit(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    _check(family, dtype, tmp_path)


@pytest.mark.parametrize("family", UNSUPPORTED, ids=lambda f: f.name)
def test_families_without_the_experts_interface_are_refused_by_name(family: Family, tmp_path: Path) -> None:
    family.build(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"does not use transformers' experts interface") as refusal:
        runtime.load(tmp_path)
    assert family.build(torch.float32).config.model_type in str(refusal.value)


def test_routing_of_layers_that_run_several_times_per_pass_is_not_recorded(tmp_path: Path) -> None:
    family = next((family for family in FAMILIES if family.name == "inkling2_loop"), None)
    if family is None:
        pytest.skip("this transformers has no family that loops layers yet")
    family.build(torch.float32).save_pretrained(tmp_path)
    with runtime.load(tmp_path, overrides={"cache.slots": 4}) as engine:
        engine.start_trace()
        with pytest.raises(TraceError, match="several times per pass"):
            _outputs(engine.model, family)
        engine.check_integrity()


@pytest.mark.parametrize("named", ["Glm4MoeForCausalLM", "SarvamMoEForCausalLM", None])
def test_a_family_without_a_class_is_computed_by_the_one_that_transformers_chooses(named: str | None) -> None:
    family = next((family for family in FAMILIES if family.name == "sarvam_moe"), None)
    if family is None:
        pytest.skip("this transformers has no such family yet")
    config = family.build(torch.float32).config
    config.architectures = named and [named]
    assert model_class(config).__name__ == "Glm4MoeForCausalLM"


def test_top_k_is_known_for_every_family_that_generates() -> None:
    configs = {f.name: f.build(torch.float32).config for f in FAMILIES if f.mode == "generate"}
    unknown = [name for name, config in configs.items() if top_k_of(config) is None]
    assert not unknown, f"no top-k found for {unknown}"
