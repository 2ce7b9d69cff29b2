"""Training resumes exactly, and the corpus split leaks nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.demo import corpus
from harness.demo.corpus import CorpusError, Document
from harness.demo.recipe import MODEL, Recipe, Stage
from harness.demo.streams import Streams
from harness.demo.train import Trainer
from runtime.errors import ExpertFlowError

TINY = MODEL | {"vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_attention_heads": 2}  # fmt: skip
RECIPE = Recipe(
    stages=(Stage(3, 2, 16), Stage(3, 1, 48)),
    processes=1,
    warmup_steps=2,
    checkpoint_every=2,
    evaluate_every=1,
    model=TINY,
)


@pytest.fixture
def streams(tmp_path: Path) -> Streams:
    generator = np.random.default_rng(0)
    for name in ("train_a", "train_b", "held_out_a", "held_out_b"):
        np.save(tmp_path / f"{name}.npy", generator.integers(0, 64, 300).astype(np.uint16))
    return Streams(tmp_path, {"a": 0.5, "b": 0.5})


def _trainer(out: Path, streams: Streams) -> Trainer:
    out.mkdir(exist_ok=True)
    return Trainer(RECIPE, out, 0, streams)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, streams: Streams) -> None:
    whole = _trainer(tmp_path / "whole", streams)
    whole.run()
    broken = _trainer(tmp_path / "broken", streams)
    _interrupt_after(broken.model.lm_head, calls=24)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = _trainer(tmp_path / "broken", streams)
    assert 0 < resumed.first_step < RECIPE.num_steps
    resumed.run()
    assert resumed.curve == whole.curve and len(whole.curve) == 6
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def _interrupt_after(module: torch.nn.Module, calls: int) -> None:
    """Ctrl-C at the module's n-th call."""
    remaining = iter(range(calls - 1))

    def hook(*_: object) -> None:
        if next(remaining, None) is None:
            raise KeyboardInterrupt

    module.register_forward_pre_hook(hook)


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path, streams: Streams) -> None:
    _trainer(tmp_path / "run", streams).run()
    with pytest.raises(ExpertFlowError, match="another recipe"):
        Trainer(Recipe(model=TINY, seed=5), tmp_path / "run", 0, streams)


def test_schedule_reaches_ten_million_tokens_with_a_long_last_stage() -> None:
    recipe = Recipe()
    assert recipe.tokens_at(recipe.num_steps) >= 10_000_000
    assert recipe.stage(recipe.num_steps - 1).sequence >= 2048
    assert recipe.rate(recipe.num_steps - 1) < recipe.rate(recipe.warmup_steps) / 10


def _words(seed: int, count: int = 400) -> str:
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).integers(0, 10_000, count))


def test_near_duplicates_are_dropped_and_others_kept() -> None:
    text = _words(0)
    copy = text.replace("w1", "v1", 1) + " and a new end"
    documents = [Document("a", str(index), item) for index, item in enumerate([text, copy, _words(1)])]
    assert [document.source for document in corpus.drop_near_duplicates(documents)] == ["0", "2"]


def test_split_has_no_source_on_both_sides_and_no_leak() -> None:
    documents = [Document("a", f"{index // 2}", _words(index)) for index in range(400)]
    clean = corpus.split(documents)
    assert 0 < len(clean.held_out) < 0.2 * len(documents)
    assert not {document.source for document in clean.train} & {document.source for document in clean.held_out}
    leaking = clean.held_out[0]
    planted = Document("a", clean.train[0].source, leaking.text[:-40])
    again = corpus.split([*documents, planted])
    assert planted in again.train and leaking not in again.held_out
    assert max(corpus.leak_fractions(again.train, again.held_out)) < corpus.LEAK_FRACTION


def test_long_documents_are_cut_at_line_ends_without_loss() -> None:
    text = "\n".join(f"line {number} " + "x" * 90 for number in range(500))
    pieces = list(corpus.cut(Document("a", "s", text)))
    assert len(pieces) > 1 and "\n".join(piece.text for piece in pieces) == text


def test_missing_package_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"golang-1\.19-src.*dpkg -x"):
        corpus.collect("go", tmp_path)


def test_maths_comes_from_the_repository_alone(tmp_path: Path) -> None:
    first = next(corpus.KINDS["maths"](tmp_path))
    assert first.kind == "maths" and first.text.startswith("Question: ") and "\nAnswer: " in first.text
