"""Follows the model's forward passes: which phase runs, which tokens are in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.vocabulary import Pass, Phase


class PassTracker:
    """Knows the running pass and tells listeners when one begins. A pass with one token per sequence is a decode
    step."""

    def __init__(self) -> None:
        self.current = Pass(Phase.PREFILL, 0, 0)
        self.listeners: list[Callable[[Pass], None]] = []
        self._step = 0

    def attach(self, model: PreTrainedModel) -> None:
        """Follow `model`; the base model is watched, so that a language-model head above it does not matter."""
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shaped = ids if ids is not None else kwargs["inputs_embeds"]
        batch, length = shaped.shape[0], shaped.shape[1]
        self.current = Pass(
            phase=Phase.DECODE if length == 1 else Phase.PREFILL,
            num_tokens=batch * length,
            step=self._step,
            token_ids=tuple(ids.reshape(-1).tolist()) if isinstance(ids, torch.Tensor) else (),
            requests=tuple(request for request in range(batch) for _ in range(length)),
        )
        self._step += 1
        for listener in self.listeners:
            listener(self.current)
