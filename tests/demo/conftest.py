"""The bundled model, its untrained control and held-out text, loaded once for all demo tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from harness.demo.statistics import Passage, Routing, load_passages, observe, untrained_control
from harness.demo.widen import bundled_model, widen

EXPERT_BYTES = 6 * 256 * 96  # hidden x 2 and 64 intermediate units to 96, which repeats half of them twice
PASSAGES, TOKENS = 8, 300


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    return load_passages(bundled_model(), PASSAGES, TOKENS)


@pytest.fixture(scope="session")
def trained_routing(trained: Qwen3MoeForCausalLM, passages: list[Passage]) -> list[Routing]:
    return [observe(trained, passage) for passage in passages]


@pytest.fixture(scope="session")
def untrained_routing(passages: list[Passage]) -> list[Routing]:
    control = untrained_control()
    return [observe(control, passage) for passage in passages]


@pytest.fixture(scope="session")
def wide_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "hub"
    return widen(bundled_model(), out, expert_bytes=EXPERT_BYTES, hidden_size=256, shard_bytes=16 * 2**20)


@pytest.fixture(scope="session")
def wide_fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "fused"
    return widen(bundled_model(), out, expert_bytes=EXPERT_BYTES, hidden_size=256, layout="fused")
