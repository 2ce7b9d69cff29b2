"""The bundled checkpoint and workload are what the specification asks for."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer, Qwen3MoeForCausalLM

import harness.demo
from harness.demo.corpus import KINDS
from harness.demo.statistics import HELD_OUT
from harness.demo.widen import bundled_model

DEMO = Path(harness.demo.__file__).parent


def test_model_has_the_specified_shape(trained: Qwen3MoeForCausalLM) -> None:
    config = trained.config
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (8, 32, 4)
    assert config.max_position_embeddings >= 4096
    assert sum(path.stat().st_size for path in bundled_model().glob("*.safetensors")) <= 16e6


def test_greedy_generation_stops_at_the_limit(trained: Qwen3MoeForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    prompt = tokenizer("def main():\n", return_tensors="pt")
    tokens = trained.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert prompt["input_ids"].shape[1] < tokens.shape[1] <= prompt["input_ids"].shape[1] + 8


def test_tokenizer_is_lossless_on_every_kind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    assert len(tokenizer) == 4096
    for line in HELD_OUT.read_text("utf-8").splitlines()[::10]:
        text = json.loads(line)["text"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_text_has_every_kind_at_the_promised_lengths() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    rows = [json.loads(line) for line in HELD_OUT.read_text("utf-8").splitlines()]
    lengths = [(row["task"], len(tokenizer(row["text"])["input_ids"])) for row in rows]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(1200 <= length <= 4096 for _, length in lengths)
    counts, long = Counter(task for task, _ in lengths), Counter(task for task, length in lengths if length >= 2200)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 10 and min(long[kind] for kind in KINDS) >= 3
    assert HELD_OUT.stat().st_size <= 1.5e6


def test_loss_curve_covers_ten_million_tokens_and_ends_on_long_sequences() -> None:
    rows = list(csv.DictReader((DEMO / "loss_curve.csv").open()))
    assert int(rows[-1]["tokens"]) >= 10_000_000
    assert int(rows[-1]["sequence"]) >= 2048
    assert all(float(rows[-1][kind]) < float(rows[0][kind]) for kind in KINDS)
