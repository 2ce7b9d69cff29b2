"""Load a checkpoint with its experts left at rest.

The model class is subclassed so that the parameters of its experts modules are taken away right after `__init__`; an
ordinary `from_pretrained` then loads everything else. Expert tensors are never materialised. Works for every class that
transformers decorates with `use_experts_implementation`, which the attributes that the decorator sets give away.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from runtime.errors import CheckpointError, UnsupportedModelError, one_line
from runtime.own_memory import copy_out
from runtime.transfer.safetensors_index import read_header
from runtime.transfer.store import ExpertLayer, ExpertParameter

# MoE families that do not use transformers' experts interface; everything else without experts modules is dense.
UNSUPPORTED_FAMILIES = frozenset(
    [
        "dbrx",
        "doge",
        "jetmoe",
        "llama4",
        "llama4_text",
        "longcat_flash",
        "nllb-moe",
        "step3p7",
        "step3p7_text",
        "switch_transformers",
    ]
)

_HUB_ID = r"[\w.-]+(/[\w.-]+)?"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model, its experts modules in execution order, and the files that hold the experts."""

    model: PreTrainedModel
    modules: tuple[Any, ...]
    layers: tuple[ExpertLayer, ...]
    files: tuple[Path, ...]


def read_config(model: str) -> PreTrainedConfig:
    """Configuration of a checkpoint folder or hub id.

    Raises:
        CheckpointError: not a checkpoint. UnsupportedModelError: quantised.
    """
    folder = Path(model)
    is_here = os.path.exists(folder)  # Path.exists raises for a name that is too long
    if is_here and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{model} is not a checkpoint: it has no config.json; give the folder that holds the model"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if is_here:
            why = one_line(error) if isinstance(error, StrictDataclassError) else _first_line(error)
            raise CheckpointError(
                f"{folder / 'config.json'} cannot be used: {why.rstrip('.')}; copy the one that came with the "
                f"checkpoint again: it must be of a family that transformers {transformers.__version__} knows"
            ) from error
        # A gated model, or a hub that was not reached; of what is no hub id it only says that.
        why = f": {_first_line(error)}" if re.fullmatch(_HUB_ID, model) else ""
        raise CheckpointError(
            f"no checkpoint at {model}: neither a folder nor a model that the hub or its cache has{why}; check the "
            "path (profiles are named with .yaml)"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModelError(
            f"{model} is quantised ({getattr(method, 'value', method)}), which is not supported yet; "
            "use the checkpoint in bfloat16, float16 or float32"
        )
    return config


def read_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint folder or hub id.

    Raises:
        CheckpointError: it has none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} has no tokenizer that can be loaded, which text needs: {_first_line(error)}"
        ) from error
    return tokenizer


def checkpoint_files(model: str) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, each there and with a sound header.

    Raises:
        CheckpointError: no safetensors, a shard is missing, or a file is truncated or corrupt.
    """
    index = _locate(model, _INDEX)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is corrupt ({_first_line(error)}); download it again") from error
        found = [(name, _locate(model, name)) for name in names]
    else:
        found = [(_WEIGHTS, _locate(model, _WEIGHTS))]
    missing = [name for name, path in found if path is None]
    if missing and index is None:
        raise CheckpointError(f"{model} has no {_WEIGHTS} nor {_INDEX}; only safetensors checkpoints are supported")
    if missing:
        raise CheckpointError(
            f"{model} lacks the shard {missing[0]} that its index names; download the checkpoint again"
        )
    files = tuple(path for _, path in found if path is not None)
    for path in files:
        read_header(path)
    return files


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint says it is of, else the one that transformers would choose for its configuration."""
    for name in getattr(config, "architectures", None) or ():
        found: type[PreTrainedModel] | None = getattr(transformers, name, None)
        found = found or getattr(_modeling_module(config), name, None)
        if found is not None:
            return found
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            chosen: Any = auto._model_mapping[type(config)]
            return chosen[0] if isinstance(chosen, tuple) else chosen  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"transformers {transformers.__version__} has no model for {type(config).__name__}")


def _modeling_module(config: PreTrainedConfig) -> ModuleType | None:
    """The modeling file beside the configuration's; None where a class of another family computes the model."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def load_offloaded(model: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> LoadedModel:
    """Load everything but the experts.

    Args:
        model: checkpoint folder or hub id, hub or fused layout, sharded or not.
        dtype: as in `from_pretrained`; "auto" takes the checkpoint's.
        device: where it computes.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    config = read_config(model)
    files = checkpoint_files(model)
    found: list[tuple[Any, ExpertLayer]] = []
    stripped = _stripped_class(model_class(config), found)
    loaded = stripped.from_pretrained(model, config=config, dtype=dtype).eval().to(device)
    # On a GPU they are a copy already.
    copy_out([tensor for tensor in (*loaded.parameters(), *loaded.buffers()) if tensor.device.type == "cpu"], files)
    # Put back for the store, which finds tied experts under the name that the checkpoint has them by.
    loaded.all_tied_weights_keys |= loaded._tied_experts
    return LoadedModel(loaded, tuple(m for m, _ in found), tuple(layer for _, layer in found), files)


def load_resident(model: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> LoadedModel:
    """Load the whole model: the reference for `load_offloaded`. Same errors."""
    config = read_config(model)
    files = checkpoint_files(model)
    loaded = model_class(config).from_pretrained(model, config=config, dtype=dtype).eval().to(device)
    found = _experts_modules(loaded)
    return LoadedModel(loaded, tuple(m for m, _ in found), tuple(layer for _, layer in found), files)


def meta_model(model: str, *, dtype: torch.dtype | str = "auto") -> LoadedModel:
    """The model without any weights, on the meta device, its experts taken away: for shapes and sizes. Same errors."""
    config = read_config(model)
    found: list[tuple[Any, ExpertLayer]] = []
    with torch.device("meta"):
        built = _stripped_class(model_class(config), found)._from_config(config, dtype=_dtype_of(config, dtype))
    return LoadedModel(built, tuple(m for m, _ in found), tuple(layer for _, layer in found), ())


def _dtype_of(config: PreTrainedConfig, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = config.get_text_config().dtype or config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def routers_and_norms(loaded: LoadedModel) -> list[tuple[nn.Module | None, nn.Module | None]]:
    """For each experts module the router beside it and the norm before their block, where they can be told.

    The router is the one sibling with a `weight` of one row per expert. The norm is the last one that the decoder layer
    declares before or after its attention by one of the names that transformers uses.
    """
    return [_router_and_norm(loaded.model, layer) for layer in loaded.layers]


_NORMS = (
    "post_attention_layernorm",
    "pre_feedforward_layernorm_2",
    "pre_feedforward_layernorm",
    "ffn_norm",
    "pre_ff_layernorm",
    "norm",
)


def _router_and_norm(model: PreTrainedModel, layer: ExpertLayer) -> tuple[nn.Module | None, nn.Module | None]:
    block = model.get_submodule(layer.prefix.rpartition(".")[0])
    routers = [
        child
        for child in block.children()
        if getattr(getattr(child, "weight", None), "shape", (None,))[0] == layer.num_experts
    ]
    decoder = model.get_submodule(layer.prefix.rpartition(".")[0].rpartition(".")[0])
    norms = [getattr(decoder, name) for name in _NORMS if hasattr(decoder, name)]
    return (routers[0] if len(routers) == 1 else None), (norms[0] if norms else None)


def _stripped_class(base: type[PreTrainedModel], found: list[tuple[Any, ExpertLayer]]) -> type[PreTrainedModel]:
    """`base` without the parameters of its experts modules, which are listed in `found` when it is built."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        found.extend(_experts_modules(self))
        stripped = {f"{layer.prefix}.{parameter.name}" for _, layer in found for parameter in layer.parameters}
        self._tied_experts = {name: to for name, to in self.all_tied_weights_keys.items() if name in stripped}
        for name in self._tied_experts:
            del self.all_tied_weights_keys[name]
        for module, layer in found:
            for parameter in layer.parameters:
                del module._parameters[parameter.name]
            # Else weight initialisation, of the module or the block around it, looks for what was taken away.
            module._is_hf_initialized = True
            self.get_submodule(layer.prefix.rpartition(".")[0])._is_hf_initialized = True
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | {
            rf"^{re.escape(layer.prefix)}\.(\d+\.)?[^.]*(\.weight|\.bias)?$" for _, layer in found
        }

    # Code that is not under transformers' own module path is "custom" to it and loses the key conversions.
    attributes = {"__init__": __init__, "__module__": base.__module__, "save_pretrained": _refuse_to_save}
    return type(base.__name__, (base,), attributes)


def _refuse_to_save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "an offloaded model cannot be saved: its experts are not in memory; copy the checkpoint that it was loaded from"
    )


def _experts_modules(model: PreTrainedModel) -> list[tuple[Any, ExpertLayer]]:
    """The experts modules of a model, in the order of their layers.

    Raises:
        UnsupportedModelError: it has none.
    """
    found = [
        (module, _expert_layer(name, module))
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")
    ]
    if not found:
        family = model.config.model_type
        if family in UNSUPPORTED_FAMILIES:
            raise UnsupportedModelError(
                f"the MoE family {family} does not use transformers' experts interface and is not supported"
            )
        raise UnsupportedModelError(f"{family} is a dense model: it has no experts to offload; use plain transformers")
    return found


def _expert_layer(prefix: str, module: Any) -> ExpertLayer:
    """The parameters that lie directly in an experts module, one row per expert."""
    parameters = tuple(
        ExpertParameter(name, tuple(parameter.shape[1:]), parameter.dtype)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == module.num_experts
    )
    return ExpertLayer(prefix, int(module.num_experts), parameters)


def _locate(model: str, name: str) -> Path | None:
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
