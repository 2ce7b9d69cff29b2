"""Every expert's slot holds, bit for bit, what `from_pretrained` makes of the checkpoint, in every layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from runtime.errors import CheckpointError
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertLayer, ExpertParameter, ExpertStore
from runtime.vocabulary import Load, LoadReason

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=40),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "GptOssForCausalLM": lambda: transformers.GptOssConfig(
        **SMALL, num_local_experts=4, layer_types=["full_attention"] * 2, sliding_window=32
    ),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A tiny model with random weights and biases."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]()).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def expert_layers(model: PreTrainedModel) -> list[ExpertLayer]:
    """The experts modules as the model has them; dtypes are the model's."""
    return [
        ExpertLayer(
            name,
            module.num_experts,
            tuple(
                ExpertParameter(key, tuple(value.shape[1:]), value.dtype)
                for key, value in module.named_parameters(recurse=False)
            ),
        )
        for name, module in model.named_modules()
        if hasattr(module, "has_gate")
    ]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_store_equals(model: PreTrainedModel, files: list[Path], direct: bool | None = None) -> ExpertStore:
    """Load every expert of every layer and compare its views with the model's parameters."""
    layers = expert_layers(model)
    store = ExpertStore.open(model, files, layers)
    num_experts = store.num_layers * store.num_experts
    assert all(store.slot_bytes <= layer.slot_bytes for layer in layers)
    arena = SlotArena(num_experts, store.slot_bytes)
    transfer = DiskTransfer(store, arena, piece_bytes=4096, direct=direct)
    transfer.submit([Load(expert, expert, LoadReason.DEMAND) for expert in range(num_experts)])
    for expert in range(num_experts):
        transfer.wait_any([expert])
        layer, index = divmod(expert, store.num_experts)
        assert [place.name for place in store.tensors(expert)] == [p.name for p in layers[layer].parameters]
        for place in store.tensors(expert):
            view = arena.view(expert, place)
            wanted = model.get_parameter(f"{layers[layer].prefix}.{place.name}")[index]
            assert view.data_ptr() % 64 == 0
            assert view.dtype == wanted.dtype
            assert torch.equal(view, wanted), (layers[layer].prefix, place, index)
    transfer.close()
    return store


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_gives_the_loaded_parameters(tmp_path: Path, name: str, layout: str, dtype: torch.dtype) -> None:
    build(name, dtype).save_pretrained(tmp_path, max_shard_size="30KB", save_original_format=layout == "hub")
    loaded = getattr(transformers, name).from_pretrained(tmp_path, dtype=dtype)
    assert len(shards(tmp_path)) > 2
    store = assert_store_equals(loaded, shards(tmp_path))
    assert not any(store.recipe(expert).conversions for expert in range(8))
    assert_store_equals(loaded, shards(tmp_path), direct=False)


def test_neighbours_in_the_file_are_one_read(tmp_path: Path) -> None:
    build("Qwen3MoeForCausalLM").save_pretrained(tmp_path)
    store = assert_store_equals(build("Qwen3MoeForCausalLM"), shards(tmp_path))
    assert [len(store.recipe(expert).segments) for expert in range(8)] == [1] * 8
    assert store.recipe(0).segments[0].num_bytes == store.expert_bytes


@pytest.mark.parametrize(("stored", "computed"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_experts_are_cast_to_the_dtype_of_computation(
    tmp_path: Path, name: str, stored: torch.dtype, computed: torch.dtype
) -> None:
    build(name, stored).save_pretrained(tmp_path, max_shard_size="50KB")
    loaded = getattr(transformers, name).from_pretrained(tmp_path, dtype=computed)
    store = assert_store_equals(loaded, shards(tmp_path))
    assert len(store.recipe(0).conversions) == len(store.tensors(0))


def test_transposed_checkpoint_goes_through_transformers_conversion(tmp_path: Path) -> None:
    text = {**SMALL, "num_experts": 4, "moe_intermediate_size": 40, "rope_parameters": {"mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    vision["deepstack_visual_indexes"] = [0]
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    (file,) = shards(tmp_path)
    tensors = load_file(file)
    is_expert = [name for name in tensors if ".mlp.experts." in name]
    turned = {name: tensors[name].transpose(1, 2).contiguous() for name in is_expert}
    save_file(tensors | turned, file, {"format": "pt"})
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    name = next(name for name in is_expert if "gate_up" in name)
    assert torch.equal(loaded.state_dict()[name], tensors[name])
    store = assert_store_equals(loaded, shards(tmp_path))
    assert len(store.recipe(0).conversions) == 2


@pytest.mark.parametrize("with_prefix", [True, False])
def test_base_model_prefix_may_be_there_or_not(tmp_path: Path, with_prefix: bool) -> None:
    whole = build("Qwen3MoeForCausalLM")
    (whole if with_prefix else whole.model).save_pretrained(tmp_path)
    assert_store_equals(whole.model if with_prefix else whole, shards(tmp_path))


@pytest.mark.parametrize("stripped", [True, False])
def test_model_may_be_on_meta_and_without_its_experts(tmp_path: Path, stripped: bool) -> None:
    real = build("Qwen3MoeForCausalLM")
    real.save_pretrained(tmp_path)
    with torch.device("meta"):
        meta = transformers.Qwen3MoeForCausalLM(real.config)
    layers = expert_layers(real)
    for layer in layers if stripped else []:
        meta.get_submodule(layer.prefix)._parameters.clear()
    store = ExpertStore.open(meta, shards(tmp_path), layers)
    assert store.recipe(3) == ExpertStore.open(real, shards(tmp_path), layers).recipe(3)
    assert store.prefixes == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def test_tied_experts_are_read_where_they_are_stored(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    model, file = checkpoint
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.experts" not in k}, file)
    first, second = expert_layers(model)
    assert f"{second.prefix}.gate_up_proj" in refusal(model, file)
    names = [parameter.name for parameter in first.parameters]
    model.all_tied_weights_keys = {f"{second.prefix}.{name}": f"{first.prefix}.{name}" for name in names}
    store = ExpertStore.open(model, [file], [first, second])
    assert [store.recipe(expert) for expert in range(4)] == [store.recipe(4 + expert) for expert in range(4)]


@pytest.mark.parametrize("pad_bytes", range(8, 65, 8))
def test_any_alignment_of_the_file(tmp_path: Path, pad_bytes: int) -> None:
    model = build("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    (file,) = shards(tmp_path)
    pad_header(file, pad_bytes)
    assert_store_equals(model, [file])


def pad_header(file: Path, num_bytes: int) -> None:
    """Lengthen the header by spaces, which shifts all data; the format allows it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * num_bytes
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_aligned_data_is_read_straight_into_the_slot(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path)
    (file,) = shards(tmp_path)
    layers = expert_layers(model)
    start = ExpertStore.open(model, [file], layers).recipe(0).segments[0].offset
    pad_header(file, -start % 64)
    for segment in ExpertStore.open(model, [file], layers).recipe(0).segments:
        assert segment.offset % 64 == 0
        assert (segment.offset - segment.slot_offset) % 4096 == 0
    assert_store_equals(model, [file])


def test_layers_of_different_shapes_are_refused(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path)
    first, second = expert_layers(model)
    other = ExpertLayer(second.prefix, second.num_experts, second.parameters[:1])
    for layers in ([first, other], []):
        with pytest.raises(ValueError, match="one store for each shape"):
            ExpertStore.open(model, shards(tmp_path), layers)


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build("Qwen3MoeForCausalLM")
    model.save_pretrained(folder)
    return model, folder / "model.safetensors"


def refusal(model: PreTrainedModel, file: Path) -> str:
    """The message with which the checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        ExpertStore.open(model, [file], expert_layers(model))
    assert "download it again" in str(caught.value)
    return str(caught.value)


def test_missing_file(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    model, file = checkpoint
    file.unlink()
    assert "model.safetensors: cannot be read (No such file" in refusal(model, file)


@pytest.mark.parametrize("expert", [0, 1, 3])
def test_missing_expert_is_named(checkpoint: tuple[PreTrainedModel, Path], expert: int) -> None:
    model, file = checkpoint
    name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    assert f"tensor '{name}' is missing" in refusal(model, file)


@pytest.mark.parametrize("kind", ["gate_proj", "down_proj"])
def test_missing_matrix_of_all_experts(checkpoint: tuple[PreTrainedModel, Path], kind: str) -> None:
    model, file = checkpoint
    save_file({k: v for k, v in load_file(file).items() if kind not in k}, file)
    message = refusal(model, file)
    assert ("no tensor like" if kind == "gate_proj" else "no tensor for the experts") in message
    assert kind in message


def test_expert_of_another_shape_is_named(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    model, file = checkpoint
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    save_file(tensors | {name: tensors[name][:, :8].contiguous()}, file)
    message = refusal(model, file)
    assert f"'model.layers.0.mlp.experts.down_proj' cannot be made of {name}" in message
    assert "the shape [32, 8] instead of [32, 40]" in message


def test_fused_tensor_of_another_number_of_experts(tmp_path: Path) -> None:
    model = build("GptOssForCausalLM")
    model.save_pretrained(tmp_path)
    (file,) = shards(tmp_path)
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name][:3].contiguous()}, file)
    assert f"tensor '{name}' of shape [3, 48, 32] does not hold the 4 experts" in refusal(model, file)


def test_integer_experts_are_refused(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    model, file = checkpoint
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    save_file(load_file(file) | {name: torch.zeros(32, 40, dtype=torch.int8)}, file)
    with pytest.raises(CheckpointError, match=f"'{name}' is not of a floating-point dtype"):
        ExpertStore.open(model, [file], expert_layers(model))


def test_of_a_tensor_in_two_files_the_later_counts(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path)
    (file,) = shards(tmp_path)
    stale = tmp_path / "a.safetensors"
    shutil.copy(file, stale)
    data = bytearray(stale.read_bytes())
    data[-1000:] = bytes(1000)
    stale.write_bytes(data)
    assert_store_equals(model, [stale, file])
