"""Token streams of the demo corpus: tokenizer, a stream per kind and side, training batches, held-out passages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from harness.demo import corpus as text
from harness.demo.recipe import KIND_WEIGHTS, MODEL, Stage

END_OF_TEXT = "<|endoftext|>"
PASSAGES = 16
MIN_PASSAGES = 10
SHORT_TOKENS, LONG_TOKENS, MAX_TOKENS = 1_210, 2_220, 4_000


class Streams:
    """Token streams per kind, memory-mapped uint16, and the batches drawn from them."""

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        self.weights = weights
        self.train = {kind: np.load(folder / f"train_{kind}.npy", mmap_mode="r") for kind in weights}
        self.held_out = {kind: np.load(folder / f"held_out_{kind}.npy", mmap_mode="r") for kind in weights}

    def batch(self, seed: int, step: int, rank: int, stage: Stage) -> torch.Tensor:
        """int64 [batch, sequence + 1]; each sequence from one kind; a pure function of the arguments."""
        generator = np.random.default_rng([seed, step, rank])
        kinds = generator.choice(list(self.weights), size=stage.batch, p=list(self.weights.values()))
        rows = []
        for kind in kinds:
            stream = self.train[str(kind)]
            start = int(generator.integers(0, len(stream) - stage.sequence))
            rows.append(stream[start : start + stage.sequence + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def evaluation(self, kind: str, sequence: int, max_tokens: int) -> torch.Tensor:
        """The first held-out windows of a kind, int64 [n, sequence + 1]."""
        stream = self.held_out[kind][: max_tokens + 1]
        rows = [stream[at : at + sequence + 1] for at in range(0, len(stream) - sequence, sequence)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def train_tokenizer(documents: list[text.Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on at most 600,000 characters of each kind, so that no kind crowds out another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    budget = dict.fromkeys(KIND_WEIGHTS, 600_000)
    sample = []
    for document in documents:
        if budget.get(document.kind, 0) > 0:
            budget[document.kind] -= len(document.text)
            sample.append(document.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=4096
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """uint16 stream of all texts, each followed by the end-of-text token."""
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return np.array([token for row in ids for token in [*row, tokenizer.eos_token_id]], dtype=np.uint16)


def prepare(out: Path, root: Path) -> None:
    """Corpus, tokenizer and token streams under `out`; done once (a later start finds `out/streams/done`)."""
    streams = out / "streams"
    if (streams / "done").exists():
        return
    streams.mkdir(parents=True, exist_ok=True)
    corpus = text.build(root)
    tokenizer = train_tokenizer(corpus.train, MODEL["vocab_size"])
    tokenizer.save_pretrained(out / "tokenizer")
    for kind in text.KINDS:
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            np.save(streams / f"{side}_{kind}.npy", encode(tokenizer, [d.text for d in documents if d.kind == kind]))
    with (streams / "held_out.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in corpus.held_out)
    (streams / "done").touch()


def _recut(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[str]:
    """Lines of all texts joined again to passages, the first three of LONG_TOKENS, the others of SHORT_TOKENS."""
    lines: list[str] = []
    number = 0
    for line in "\n".join(texts).splitlines(keepends=True):
        lines.append(line)
        target = LONG_TOKENS if number < 3 else SHORT_TOKENS
        if len(lines) % 8 == 0 and len(tokenizer("".join(lines))["input_ids"]) >= target:
            yield "".join(lines).strip("\n")
            lines, number = [], number + 1


def held_out_passages(tokenizer: PreTrainedTokenizerFast, documents: list[text.Document]) -> Iterator[dict[str, str]]:
    """Workload rows {id, task, text}: up to PASSAGES held-out documents a kind, each of SHORT_TOKENS at least.

    A kind with fewer than MIN_PASSAGES such documents (german: lists of messages) has its lines cut anew.
    """
    for kind in text.KINDS:
        texts = [document.text for document in documents if document.kind == kind]
        passages = [
            item for item in texts if SHORT_TOKENS <= len(tokenizer(item, verbose=False)["input_ids"]) <= MAX_TOKENS
        ]
        if len(passages) < MIN_PASSAGES:
            passages = list(_recut(tokenizer, texts))
        for number, passage in enumerate(passages[:PASSAGES]):
            yield {"id": f"{kind}-{number:02d}", "task": kind, "text": passage}
