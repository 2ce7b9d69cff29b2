"""What the commands of `harness.batching` that run the model have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from harness.demo.widen import widened
from harness.measure import process as processes
from harness.measure.batch_file import ResultFile
from harness.measure.limits import ModelBytes
from harness.measure.process import Spec
from harness.measure.workload import TokenRequest, cut, load_workload
from runtime.facts import ModelFacts, describe
from runtime.model import checkpoint_files, read_tokenizer

DEMO_EXPERT_BYTES = 6 << 20


@dataclass(frozen=True)
class Setup:
    """What the arguments mean on this machine."""

    options: argparse.Namespace
    model: str
    facts: ModelFacts
    sizes: ModelBytes
    tokenizer: Any
    files: Sequence[Path]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setup:
        """Raises CheckpointError where there is no tokenizer."""
        disable_progress_bar()
        model = options.model or str(widened(DEMO_EXPERT_BYTES))
        facts = describe(model)
        sizes = ModelBytes(facts.dense_bytes, facts.slot_bytes, facts.num_experts_total)
        return cls(options, model, facts, sizes, read_tokenizer(model), checkpoint_files(model))

    def texts(self, prompt_tokens: int, output_tokens: int, number: int) -> list[TokenRequest]:
        """Held-out text of several tasks."""
        return list(
            cut(
                load_workload(self.options.workload),
                self.tokenizer,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                num_requests=number,
                part="confirm",
            )
        )

    def spec(self, kind: processes.Kind, **overrides: Any) -> Spec:
        """A contender with this model and these threads."""
        own = {"compute.threads": self.options.threads, **overrides}
        return Spec(kind, self.model, self.options.threads, overrides=own)

    def file(self, what: str, **about: Any) -> ResultFile:
        """Where the result goes."""
        model = {
            "name": Path(self.model).name,
            **self.facts.identity.model_dump(),
            "dense_bytes": self.facts.dense_bytes,
        }
        return ResultFile.create(self.options.out, what, model=model, threads=self.options.threads, **about)


def say(text: str) -> None:
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def bar_of(total: int) -> Iterator[Any]:
    """A progress bar of so many runs."""
    with tqdm(total=total, desc="measuring", unit="run", file=sys.stderr) as bar:
        yield bar


@contextmanager
def running_engine(setup: Setup) -> Iterator[Any]:
    """One engine with `--slots`, in a process of its own."""
    say("loading")
    slots = setup.sizes.slots_of(setup.options.slots)
    spec = setup.spec("batch", **{"cache.slots": slots})
    with processes.start("batching", spec, limit_bytes=None, use_cgroup=False) as process:
        for note in process.facts["notes"]:
            say(f"note: {note}")
        yield process


def finish(setup: Setup, file: ResultFile, summary: dict[str, Any], text: str) -> int:
    """Write and print what was found."""
    file.save(complete=True, summary=summary)
    if not setup.options.json:
        print(f"{text}\nraw samples: {file.path}")
    print(json.dumps(summary))
    return 0
