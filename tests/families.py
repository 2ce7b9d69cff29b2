"""Tiny random models of every Mixture-of-Experts family of transformers that uses the experts interface.

The rows are in `family_rows`; this module makes a model and its inputs from a row. Modeling files are imported when a
model is built, and a family that the installed transformers lacks, or does not decorate yet, is left out.
"""

from __future__ import annotations

import importlib
import inspect
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import transformers
from family_configs import SMALL, Config, Row
from family_rows import ROWS, UNDECORATED_ROWS
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_MODELS = Path(transformers.__file__).parent / "models"
_EXPERT_STD = 0.2
_FIRST_PLAIN_TOKEN = 16
_INPUT_SHAPE = (2, 9)


class Family(Row):
    """A row that can be built."""

    def build(self, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, its tensors in the dtypes that `from_pretrained(..., dtype=dtype)` gives them."""
        model_class = _model_class(self.name, self.model)
        config = _build_config(self.name, self.config)
        config.architectures = [self.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
            _randomise(model)
        # `.to(dtype)` would also round the rotary frequencies and the tensors that transformers keeps in float32.
        model = model_class.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
        # Without this record of how it was loaded, `save_pretrained` writes the hub layout, as for any new model.
        del model._weight_conversions
        return realign(model.eval())

    def inputs(self) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and the extra inputs, int64 `[2, 9]`; no padding and no special token."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(_FIRST_PLAIN_TOKEN, SMALL["vocab_size"], _INPUT_SHAPE, generator=generator)
        extra = {name: ids.flip(1) for name in self.extra_inputs}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def realign(model: PreTrainedModel) -> PreTrainedModel:
    """Move every tensor of the model to memory of its own, aligned to 64 bytes.

    `from_pretrained` leaves tensors in the mapped file, at any offset, and MKL's float32 kernels round differently
    there (seen with one or two tokens, at addresses that 16 does not divide). Compare realigned models only.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def is_decorated(module: torch.nn.Module) -> bool:
    """Whether the module's class carries `use_experts_implementation`, told by what the decorator sets."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _model_class(family: str, name: str) -> type[PreTrainedModel]:
    """Some families have a configuration only, and are computed by another family's class."""
    found: type[PreTrainedModel] | None = getattr(transformers, name, None)
    return found or getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _build_config(family: str, config: Config) -> PreTrainedConfig:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config_class = getattr(module, config.cls, None) or getattr(transformers, config.cls)
    fields = inspect.signature(config_class).parameters
    values = {name: value for name, value in SMALL.items() if name in fields} | deepcopy(config.overrides)
    values = {k: _build_config(family, v) if isinstance(v, Config) else v for k, v in values.items()}
    built: PreTrainedConfig = config_class(**values)
    return built


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Fill the experts, and move whatever the class initialises to a constant (biases, norms) off it.

    A tensor that is lost, swapped or left at its initial value then changes the logits.
    """
    experts = tuple(f"{name}." for name, module in model.named_modules() if is_decorated(module))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            _randomise_expert_ids(tensor, model.config)
        elif name.startswith(experts) and tensor.ndim > 1:
            tensor.normal_(0.0, _EXPERT_STD)
        elif tensor.numel() > 1 and torch.all(tensor == tensor.flatten()[0]):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _randomise_expert_ids(tensor: torch.Tensor, config: PreTrainedConfig) -> None:
    """DeepSeek-V4's hash router keeps a table `[vocab, top_k]` of expert ids: distinct ones for every token."""
    if tensor.ndim == 2:
        scores = torch.rand(tensor.shape[0], config.get_text_config().num_local_experts)
        tensor.copy_(scores.topk(tensor.shape[1]).indices)


@cache
def decorated_families() -> set[str]:
    """Model directories of the installed transformers with a class that `use_experts_implementation` decorates.

    With them those that have a configuration only, and are computed by a class of one of these.
    """
    decorator = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
    own = {path.parent.name for path in _MODELS.glob("*/modeling_*.py") if decorator.search(path.read_text("utf-8"))}
    return own | {family for family, lender in _borrowers().items() if lender in own}


def _borrowers() -> dict[str, str]:
    """Model directories without a model, and the directory of the causal language model that computes them."""
    found = {path.parent.name for path in _MODELS.glob("*/configuration_*.py")}
    found -= {path.parent.name for path in _MODELS.glob("*/modeling_*.py")}
    names = {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) for family in found}
    return {family: getattr(transformers, name).__module__.split(".")[-2] for family, name in names.items() if name}


FAMILIES: tuple[Family, ...] = tuple(Family(**vars(row)) for row in ROWS if row.name in decorated_families())
UNSUPPORTED: tuple[Family, ...] = tuple(Family(**vars(r)) for r in UNDECORATED_ROWS if (_MODELS / r.name).is_dir())
