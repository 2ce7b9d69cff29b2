"""Widening keeps the function: logits, routes, both layouts, uneven repeats, and the files it writes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.demo.__main__ import run
from harness.demo.statistics import Passage
from harness.demo.widen import bundled_model, choose_shape, unit_repeats, widen, widened
from runtime.errors import BudgetError, CheckpointError, ExpertFlowError, UnsupportedModelError, cli_main

MIB = 2**20


def logits_and_routes(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits [tokens, vocabulary] and sorted expert ids [layers, tokens, top_k]."""
    with torch.no_grad():
        output = model(input_ids=tokens, output_router_logits=True, use_cache=False)
    top_k = model.config.num_experts_per_tok
    routes = torch.stack([logits.topk(top_k).indices.sort().values for logits in output.router_logits])
    return output.logits[0].float(), routes


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokens(passages: list[Passage]) -> torch.Tensor:
    """60 tokens of one passage of each kind, one after the other."""
    first = {passage.task: passage.tokens[:60] for passage in passages}
    return torch.cat(list(first.values()))[None]


@pytest.fixture(scope="module", params=["hub", "fused"])
def wide(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"wide_{request.param}")
    return folder


def test_fp32_logits_agree_to_rounding_and_every_route_is_identical(
    trained: Qwen3MoeForCausalLM, wide: Path, tokens: torch.Tensor
) -> None:
    logits, routes = logits_and_routes(trained, tokens)
    wide_logits, wide_routes = logits_and_routes(load(wide), tokens)
    assert torch.equal(routes, wide_routes)
    assert (logits - wide_logits).abs().max() <= 3e-5 * logits.abs().max()


def test_bf16_keeps_99_percent_of_routes(wide_hub: Path, tokens: torch.Tensor) -> None:
    _, routes = logits_and_routes(load(bundled_model(), torch.bfloat16), tokens)
    _, wide_routes = logits_and_routes(load(wide_hub, torch.bfloat16), tokens)
    common = (routes[..., :, None] == wide_routes[..., None, :]).any(-1).float().mean()
    assert common >= 0.99


def test_layouts_hold_the_same_weights(wide_hub: Path, wide_fused: Path) -> None:
    hub, fused = load(wide_hub).state_dict(), load(wide_fused).state_dict()
    assert hub.keys() == fused.keys()
    assert all(torch.equal(hub[name], fused[name]) for name in hub)


def test_a_widened_model_in_either_layout_can_be_widened_again(wide: Path, tmp_path: Path) -> None:
    again = widen(wide, tmp_path / "again", expert_bytes=6 * 256 * 192, hidden_size=256)
    first, second = load_shards(wide), load_shards(again)
    name = "model.layers.3.mlp.experts.5.down_proj.weight"
    if name in first:
        assert torch.equal(first[name].float().sum(1), second[name].float().sum(1))
    assert second[name].shape == (256, 192)


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_untied_model_with_dense_layer_and_biases(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, moe_intermediate_size=16, num_experts=4,
        num_hidden_layers=3, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        mlp_only_layers=[1], tie_word_embeddings=False, attention_bias=True)  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "source")
    out = widen(tmp_path / "source", tmp_path / "wide", expert_bytes=6 * 128 * 32, hidden_size=128)
    tokens = torch.arange(40)[None]
    logits, routes = logits_and_routes(load(tmp_path / "source"), tokens)
    wide_logits, wide_routes = logits_and_routes(load(out), tokens)
    assert torch.equal(routes, wide_routes)
    assert (logits - wide_logits).abs().max() <= 3e-5 * logits.abs().max()


def entries(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, absolute start, absolute end) of each tensor in a safetensors file, in file order."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__")
    rows = [(name, *(8 + length + offset for offset in entry["data_offsets"])) for name, entry in table.items()]
    return iter(sorted(rows, key=lambda row: row[1]))


def test_an_expert_is_one_page_aligned_run_of_gate_up_down(wide_hub: Path) -> None:
    paths = sorted(wide_hub.glob("*.safetensors"))
    assert len(paths) > 1
    experts = 0
    for path in paths:
        names = [(name, start, end) for name, start, end in entries(path) if ".experts." in name]
        for gate, up, down in zip(names[::3], names[1::3], names[2::3], strict=True):
            prefixes = [name.removesuffix(f".{kind}_proj.weight") for name, kind in zip(
                (gate[0], up[0], down[0]), ("gate", "up", "down"), strict=True)]  # fmt: skip
            assert len(set(prefixes)) == 1
            assert gate[1] % 4096 == 0 and (gate[2], up[2]) == (up[1], down[1])
            experts += 1
    assert experts == 8 * 32


@given(source=st.sampled_from([16, 64, 100]), extra=st.integers(0, 5000))
def test_unit_repeats_are_powers_of_two_that_sum_to_the_width(source: int, extra: int) -> None:
    repeats = unit_repeats(source, source + extra)
    assert len(repeats) == source and sum(repeats) == source + extra
    assert all(repeat & (repeat - 1) == 0 and repeat > 0 for repeat in repeats)


def test_repeats_are_as_even_as_they_can_be() -> None:
    assert unit_repeats(64, 768) == (16,) * 32 + (8,) * 32


@pytest.mark.parametrize(
    ("expert_bytes", "widths"),
    [(6 * MIB, (1024, 1024)), (MIB, (256, 680)), (24 * MIB, (2048, 2048)), (786_432, (256, 512))],
)
def test_chosen_shape_is_balanced_and_just_below_the_target(expert_bytes: int, widths: tuple[int, int]) -> None:
    shape = choose_shape(128, 64, expert_bytes)
    assert (shape.hidden_size, shape.intermediate_size) == widths
    assert 0.99 * expert_bytes <= shape.expert_bytes <= expert_bytes
    assert shape.expert_bytes % 4096 == 0


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = bundled_model(), tmp_path / "out"
    with pytest.raises(BudgetError, match="49152 or more"):
        widen(source, out, expert_bytes=1000)
    with pytest.raises(BudgetError, match=r"hidden size 300.*128, 256"):
        widen(source, out, expert_bytes=MIB, hidden_size=300)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        widen(tmp_path, out, expert_bytes=MIB)
    with pytest.raises(ExpertFlowError, match="layout 'gguf'"):
        widen(source, out, expert_bytes=MIB, layout="gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(BudgetError, match="0 MiB free"):
        widen(source, out, expert_bytes=MIB)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(ExpertFlowError, match="exists already"):
        widen(source, out, expert_bytes=MIB)


def test_other_families_and_dtypes_are_refused(tmp_path: Path) -> None:
    config = json.loads((bundled_model() / "config.json").read_text())
    shutil.copytree(bundled_model(), tmp_path / "mixtral")
    (tmp_path / "mixtral" / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        widen(tmp_path / "mixtral", tmp_path / "out", expert_bytes=MIB)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(bundled_model(), tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        widen(tmp_path / "cut", tmp_path / "out", expert_bytes=MIB)


def test_cache_is_filled_once(tmp_path: Path) -> None:
    first = widened(6 * 128 * 96, cache_dir=tmp_path)
    written = (first / "config.json").stat().st_mtime_ns
    assert widened(6 * 128 * 96, cache_dir=tmp_path) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_command_prints_the_true_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--expert-bytes", "73KiB", "--hidden-size", "128", "--out", str(tmp_path / "model")]) == 0
    assert "8 layers x 32 experts of 73728 bytes" in capsys.readouterr().out


def test_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(lambda: run(["--expert-bytes", "1KiB"])) == 2
    assert capsys.readouterr().err.count("\n") == 1
