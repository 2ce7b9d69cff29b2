"""A sorted loop over experts with a hand-written backward: what training spends its time in, without autograd's copies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted_loop_training"


class _SortedLoop(torch.autograd.Function):
    """SwiGLU experts: hidden [T, H], gate_up [E, 2I, H], down [E, H, I], index and weight [T, K] -> [T, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, gate_up: Any, down: Any, index: Any, weight: Any) -> Any:
        order = index.flatten().argsort(stable=True)
        token = order // index.shape[1]
        ends = torch.bincount(index.flatten(), minlength=len(down)).cumsum(0).tolist()
        inputs, scale = hidden.index_select(0, token), weight.flatten()[order, None]
        both = hidden.new_empty(len(order), gate_up.shape[1])
        for expert, (start, end) in enumerate(pairwise([0, *ends])):
            torch.mm(inputs[start:end], gate_up[expert].t(), out=both[start:end])
        gate, up = both.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        active = gate * sigmoid * up
        scaled = active * scale
        outputs = torch.empty_like(inputs)
        for expert, (start, end) in enumerate(pairwise([0, *ends])):
            torch.mm(scaled[start:end], down[expert].t(), out=outputs[start:end])
        ctx.save_for_backward(inputs, gate_up, down, both, sigmoid, active, scaled, scale, order, token)
        ctx.ends, ctx.shape = ends, weight.shape
        return torch.zeros_like(hidden).index_add_(0, token, outputs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        inputs, gate_up, down, both, sigmoid, active, scaled, scale, order, token = ctx.saved_tensors
        grads = grad.index_select(0, token)
        d_scaled, d_down = torch.empty_like(scaled), torch.empty_like(down)
        for expert, (start, end) in enumerate(pairwise([0, *ctx.ends])):
            torch.mm(grads[start:end], down[expert], out=d_scaled[start:end])
            torch.mm(grads[start:end].t(), scaled[start:end], out=d_down[expert])
        d_weight = torch.empty(len(order), dtype=grad.dtype)
        d_weight[order] = (d_scaled * active).sum(-1)
        gate, up = both.chunk(2, dim=-1)
        d_active = d_scaled.mul_(scale)
        swish = gate * sigmoid
        d_both = torch.cat([d_active * up * (sigmoid + swish * (1 - sigmoid)), d_active * swish], dim=-1)
        d_inputs, d_gate_up = torch.empty_like(inputs), torch.empty_like(gate_up)
        for expert, (start, end) in enumerate(pairwise([0, *ctx.ends])):
            torch.mm(d_both[start:end], gate_up[expert], out=d_inputs[start:end])
            torch.mm(d_both[start:end].t(), inputs[start:end], out=d_gate_up[expert])
        d_hidden = torch.zeros_like(grad).index_add_(0, token, d_inputs)
        return d_hidden, d_gate_up, d_down, None, d_weight.view(ctx.shape)


def experts_forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The experts interface of transformers (hidden [T, H], index and weight [T, K]) for SwiGLU experts without bias."""
    return _SortedLoop.apply(hidden, module.gate_up_proj, module.down_proj, index, weight)  # type: ignore[no-untyped-call]


def register() -> str:
    """Make the kernel known to transformers; the name to give to `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME
