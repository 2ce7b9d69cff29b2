"""The time of one expert, measured on real kernels."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, NemotronHConfig

from harness.hardware import compute
from harness.hardware.compute import TOKENS, computing, measure_experts
from runtime.kernels import KERNELS
from runtime.model import meta_model


def test_every_kernel_and_number_of_threads_is_timed(tiny_checkpoint: Path) -> None:
    before = torch.get_num_threads()
    times = measure_experts(meta_model(str(tiny_checkpoint)), 2, threads=(1, 2), budget_s=0.6)
    assert {(one.kernel, one.threads) for one in times} == {(name, count) for name in KERNELS for count in (1, 2)}
    assert {one.num_tokens for one in times} <= set(TOKENS) and all(one.seconds > 0 for one in times)
    assert {(one.kernel, one.threads) for one in times if one.num_tokens == 1} == {
        (name, count) for name in KERNELS for count in (1, 2)
    }
    assert torch.get_num_threads() == before


def test_without_any_time_one_token_is_timed_all_the_same(tiny_checkpoint: Path) -> None:
    times = measure_experts(meta_model(str(tiny_checkpoint)), 2, threads=(1,), budget_s=0.0)
    assert {one.kernel for one in times if one.num_tokens == 1} == set(KERNELS)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(intermediate_size=48, num_local_experts=4, num_key_value_heads=1, **SMALL),
        NemotronHConfig(
            **SMALL,
            layers_block_type=["moe", "moe"],
            n_routed_experts=4,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
        ),
    ],
    ids=["transposed with biases", "without a gate"],
)
def test_experts_of_another_structure_are_timed(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert measure_experts(meta_model(str(tmp_path)), 2, threads=(1,), budget_s=0.0)


def test_steps_go_round_the_arena(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five experts in the arena, two for a step: no step begins with the experts of the one before."""
    loaded = meta_model(str(tiny_checkpoint))
    monkeypatch.setattr(compute, "_ARENA_BYTES", 5 * loaded.layers[0].slot_bytes)
    seen = list[int]()

    class Watching(KERNELS["eager"]):  # type: ignore[misc]
        def add(self, arrivals: Any) -> None:
            seen.extend(one.weights["down_proj"].data_ptr() for one in arrivals)
            super().add(arrivals)

        def result(self) -> torch.Tensor:
            out = super().result()
            assert out.isfinite().all() and out.abs().sum() > 0
            return out

    monkeypatch.setattr(compute, "_kernels", lambda device: {"eager": Watching})
    measure_experts(loaded, 2, threads=(1,), budget_s=0.05)
    assert len(set(seen)) == 5 and seen[:5] == seen[5:10]


def test_computing_ends_with_its_block() -> None:
    before = threading.active_count()
    with computing():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
