"""The grouped kernel against transformers' own where threads share an activation in the middle of a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from runtime.experts import Arrival, GroupedKernel

HIDDEN, TOP_K, EXPERTS = 32, 2, 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# 333 rows of 1,000 columns: the first thread's part ends in the middle of row 166, in vectors of other elements than a
# call of that row alone would have.
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(333, 1000), (100, 1000), (333, 1024), (40, 20_000)])
@torch.inference_mode()
def test_every_row_equals_that_of_one_call(two_threads: None, num_tokens: int, num_columns: int) -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=num_columns, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    generator = torch.Generator().manual_seed(0)
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    index = torch.rand(num_tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    kernel = GroupedKernel(module, hidden, index, weights, range(EXPERTS))
    for expert in reversed(range(EXPERTS)):
        mine = {name: parameter[expert] for name, parameter in module.named_parameters()}
        kernel.add([Arrival(expert, mine)])
    assert torch.equal(kernel.result(), grouped_mm_experts_forward(module, hidden, index, weights))
