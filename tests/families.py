"""Tiny random models of every Mixture-of-Experts family of transformers that uses the experts interface.

The rows are in `family_configs`; this module turns a row into a configuration, a model and its inputs. A family that the
installed transformers does not have is left out of `FAMILIES` (found without importing its modeling file).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from family_configs import ROWS, SMALL, UNDECORATED_ROWS, Config, Row
from transformers import PreTrainedConfig, PreTrainedModel

Mode = Literal["generate", "forward"]

_MODELS = Path(transformers.__file__).parent / "models"
_WEIGHT_STD = 0.2
_NUM_TOKENS = 9


@dataclass(frozen=True)
class Family:
    """A model directory of transformers with a tiny model of it.

    `mode` is "generate" when `inputs()` may go to `generate()`, "forward" when only to the model's forward.
    `layouts` are the checkpoint layouts that transformers itself can save and load again with equal logits.
    """

    name: str
    mode: Mode
    representative: bool
    layouts: tuple[str, ...]
    row: Row

    def build(self, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, its tensors in the dtypes that `from_pretrained(..., dtype=dtype)` gives them."""
        modeling = importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        model_class: type[PreTrainedModel] = getattr(modeling, self.row.model)
        config = _config(self.name, Config(self.row.config, self.row.overrides))
        config.architectures = [self.row.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
            _randomise(model)
        # `.to(dtype)` would also round the rotary frequencies and the tensors that transformers keeps in float32.
        model = model_class.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
        # Without this record of how it was loaded, `save_pretrained` writes the hub layout, as for any new model.
        del model._weight_conversions
        return realign(model).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, int64 `[2, 9]`; no padding and no special token."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(16, SMALL["vocab_size"], (2, _NUM_TOKENS), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {k: ids.flip(1) for k in self.row.extra_inputs}


def _config(family: str, config: Config) -> PreTrainedConfig:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config_class = getattr(module, config.cls, None) or getattr(transformers, config.cls)
    fields = inspect.signature(config_class).parameters
    values = {name: value for name, value in SMALL.items() if name in fields} | config.overrides
    return config_class(**{k: _config(family, v) if isinstance(v, Config) else v for k, v in values.items()})


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Fill expert weights, and move every tensor that the class initialises to a constant (biases, norms), so that
    a tensor that is lost, swapped or left at its initial value changes the logits."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if is_decorated(module))
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if not tensor.is_floating_point():
            _randomise_integers(tensor, model.config)
        elif name.startswith(experts) and tensor.ndim > 1:
            tensor.normal_(0.0, _WEIGHT_STD)
        elif tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _randomise_integers(tensor: torch.Tensor, config: PreTrainedConfig) -> None:
    """A table of expert ids per token (DeepSeek-V4's hash router): distinct random experts in every row."""
    if tensor.ndim == 2:
        scores = torch.rand(tensor.shape[0], config.get_text_config().num_local_experts)
        tensor.copy_(scores.topk(tensor.shape[1]).indices)


def realign(model: PreTrainedModel) -> PreTrainedModel:
    """Move every tensor to memory of its own, aligned to 64 bytes.

    A loaded model may lie in the mapped file at any offset, and MKL's float32 kernels round differently there (seen for
    one and two tokens at offsets that 16 does not divide). Logits are compared bit for bit only between such models.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def is_decorated(module: torch.nn.Module) -> bool:
    """Whether the module's class carries `use_experts_implementation` (the decorator sets these attributes)."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _family(row: Row) -> Family:
    return Family(row.name, row.mode, row.representative, row.layouts, row)


def _is_installed(row: Row) -> bool:
    return (_MODELS / row.name / f"modeling_{row.name}.py").is_file()


FAMILIES: tuple[Family, ...] = tuple(_family(row) for row in ROWS if _is_installed(row))
UNSUPPORTED: tuple[Family, ...] = tuple(_family(row) for row in UNDECORATED_ROWS if _is_installed(row))


@cache
def decorated_families() -> set[str]:
    """Model directories of the installed transformers with a class decorated by `use_experts_implementation`."""
    return {path.parent.name for path in _MODELS.glob("*/modeling_*.py") if _has_decorated_class(path)}


def _has_decorated_class(path: Path) -> bool:
    source = path.read_text(encoding="utf-8")
    if "use_experts_implementation" not in source:
        return False
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return any("use_experts_implementation" in ast.unparse(d) for node in classes for d in node.decorator_list)
