"""What is compared on a GPU: our engine, its resident model, transformers and accelerate, each from one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import torch

from runtime.vocabulary import Load

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.transfer.base import Transfer


@dataclass(frozen=True)
class Systems:
    """Makes the systems that are compared, each from the checkpoint: a model, and its engine if it is one of ours."""

    checkpoint: str
    device: torch.device

    def make(self, kind: str, overrides: Mapping[str, Any]) -> tuple[Any, Engine | None]:
        """One of the kinds below."""
        made: tuple[Any, Engine | None] = getattr(self, kind)(overrides)
        return made

    def gpu_reference(self, overrides: Mapping[str, Any]) -> tuple[Any, Engine]:
        """The whole model on the GPU through our kernels: what ours must equal to the bit."""
        import runtime

        engine = runtime.load_reference(self.checkpoint, device=self.device, overrides=overrides)
        return engine.model, engine

    def gpu_engine(self, overrides: Mapping[str, Any]) -> tuple[Any, Engine]:
        """Our engine."""
        import runtime

        engine = runtime.load(self.checkpoint, device=self.device, overrides=overrides, record_loads=True)
        return engine.model, engine

    def gpu_synchronous(self, overrides: Mapping[str, Any]) -> tuple[Any, Engine]:
        """Our engine as others copy: one expert after the other, each waited for by the host before it computes."""
        model, engine = self.gpu_engine(overrides)
        for pool in engine._pools:
            copy_synchronously(pool.coordinator.transfer)
        return model, engine

    def gpu_plain(self, overrides: Mapping[str, Any]) -> tuple[Any, None]:
        """The whole model on the GPU as transformers runs it."""
        return self._plain.to(self.device), None

    def gpu_accelerate(self, overrides: Mapping[str, Any]) -> tuple[Any, None]:
        """Accelerate's CPU offload: every weight in host memory, copied before its module runs. Needs accelerate."""
        from accelerate.big_modeling import cpu_offload

        return _OnDevice(cpu_offload(self._plain, self.device), self.device), None

    @property
    def _plain(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype="auto").eval()


def copy_synchronously(transfer: Transfer) -> None:
    """From now on every load has ended when `submit` returns."""
    submit = transfer.submit

    @wraps(submit)
    def submit_and_wait(loads: Sequence[Load]) -> None:
        for load in loads:
            submit([load])
            transfer.wait_any([load.expert])
            transfer.drain()

    transfer.submit = submit_and_wait  # type: ignore[method-assign]


class _OnDevice:
    """A model whose weights say that they are nowhere, with the device that it computes on."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self._model = model

    @cached_property
    def forward(self) -> Callable[..., Any]:
        forward: Callable[..., Any] = self._model.forward
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)
