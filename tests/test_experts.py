"""Kernels against transformers' own; the grouped one where threads share an activation in the middle of a row, and
behind a sort that does not keep the order of an expert's rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from runtime.kernels import Arrival, EagerKernel, GroupedKernel, Kernel, base, rows

HIDDEN, TOP_K, EXPERTS = 32, 2, 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def _check(module: Any, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    index = torch.rand(num_tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    kernel = GroupedKernel(module, hidden, index, weights, range(EXPERTS), index.numpy())
    for expert in reversed(range(EXPERTS)):
        mine = {name: parameter[expert] for name, parameter in module.named_parameters()}
        kernel.add([Arrival(expert, mine)])
    assert torch.equal(kernel.result(), grouped_mm_experts_forward(module, hidden, index, weights))


# 333 rows of 1,000 columns: the first thread's part ends in the middle of row 166, in vectors of other elements than a
# call of that row alone would have.
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(333, 1000), (100, 1000), (333, 1024), (40, 20_000)])
def test_every_row_equals_that_of_one_call(two_threads: None, num_tokens: int, num_columns: int) -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=num_columns, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    _check(Qwen3MoeExperts(config), num_tokens)


# torch.sort leaves more than 16 rows in another order. No block divides what this gate computes in one go, and the last
# elements, those of whichever row comes last, are computed by scalar code.
@pytest.mark.parametrize("num_tokens", [9, 41, 59])
def test_rows_stand_where_the_sort_leaves_them(num_tokens: int) -> None:
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=36, num_local_experts=EXPERTS)
    _check(GptOssExperts(config), num_tokens)


# Ranks in any order, an expert that several tokens or one token twice chose, one that nobody did, float32 weights.
@pytest.mark.parametrize("index", [[[2, 0]], [[1, 1]], [[0, 2], [2, 0], [2, 1]], [[1, 1], [0, 1]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_eager_kernel_adds_up_as_the_class_does(index: list[list[int]], dtype: torch.dtype) -> None:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=24, num_experts=EXPERTS)
    module, generator = Qwen3MoeExperts(config).to(dtype), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    chosen = torch.tensor(index)
    hidden = torch.randn(len(index), HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(len(index), TOP_K, generator=generator)
    demanded = sorted(set(chosen.reshape(-1).tolist()))
    kernel = EagerKernel(module, hidden, chosen, weights, demanded, chosen.numpy())
    for expert in reversed(demanded):
        kernel.add([Arrival(expert, {name: parameter[expert] for name, parameter in module.named_parameters()})])
    config._experts_implementation = "eager"
    assert torch.equal(kernel.result(), module(hidden, chosen, weights))


@pytest.mark.parametrize("num_columns", [HIDDEN, 20])  # rows that end where torch's allocations may begin, and not
@pytest.mark.parametrize("kernel", [EagerKernel, GroupedKernel])
@torch.inference_mode()
def test_many_tokens_at_once_or_a_few_at_a_time(
    kernel: type[Kernel], num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3MoeConfig(hidden_size=num_columns, moe_intermediate_size=24, num_experts=EXPERTS)
    module, generator = Qwen3MoeExperts(config), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    hidden = torch.randn(37, num_columns, generator=generator)
    index = torch.rand(37, EXPERTS + 1, generator=generator).topk(TOP_K).indices  # one past the last: none
    weights = torch.rand(37, TOP_K, generator=generator)

    def result() -> torch.Tensor:
        found = kernel(module, hidden, index, weights, range(EXPERTS), index.numpy())
        for expert in (2, 0, 1):
            found.add([Arrival(expert, {name: parameter[expert] for name, parameter in module.named_parameters()})])
        return found.result()

    at_once = result()
    expected = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        gate, up = (hidden @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        share = torch.where(index == expert, weights, 0.0).sum(dim=1, keepdim=True)
        expected += share * ((torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T)
    torch.testing.assert_close(at_once, expected)
    for num_bytes in (1, 5 * TOP_K * num_columns * 4):
        for holder in (base, rows):
            monkeypatch.setattr(holder, "AT_ONCE_BYTES", num_bytes)
        assert torch.equal(result(), at_once)


@pytest.mark.parametrize("kernel", [EagerKernel, GroupedKernel])
def test_hidden_states_that_autograd_follows(kernel: type[Kernel]) -> None:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=24, num_experts=EXPERTS)
    module, generator = Qwen3MoeExperts(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    hidden, index = torch.randn(5, HIDDEN, generator=generator), torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0], [2, 0]])
    found = []
    for follows in (False, True):
        one = kernel(module, hidden.requires_grad_(follows), index, torch.ones(5, TOP_K), range(EXPERTS), index.numpy())
        for expert in range(EXPERTS):
            one.add([Arrival(expert, {name: parameter[expert] for name, parameter in module.named_parameters()})])
        found.append(one.result().detach())
    assert torch.equal(*found)
