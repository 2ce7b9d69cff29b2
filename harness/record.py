"""Record the routing of a model as a trace: `python -m harness.record --model CHECKPOINT --out T.npz`.

Held-out text is fed to the model: its beginning as a prompt in one pass, then the real next tokens one by one, so that
the routing is that of real text. With --prompts, the model goes on from each prompt by itself (greedily) instead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main

if TYPE_CHECKING:
    from harness.measure.workload import Part, Passage
    from runtime.engine import Engine
    from runtime.profile import Profile
    from runtime.prompts import PromptRequest
    from runtime.trace import RoutingTrace

PROMPT_TOKENS, OUTPUT_TOKENS, PREFILL_TOKENS, NEW_TOKENS, MAX_TOKENS = 64, 192, 1024, 64, 16384
DEMO_NAME = "expertflow-demo"
DEMO_LICENCE = "public domain, PostgreSQL, PSF-2.0, BSD-3-Clause, MIT: see harness/demo/model/README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


@dataclass(frozen=True)
class Target:
    """What to run."""

    profile: Profile
    checkpoint: str
    name: str


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    # Imported late: --help and mistakes in the arguments answer at once.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from harness.measure.recording import run_requests
    from runtime.trace import write_trace

    disable_progress_bar()
    device, target = named_device(arguments), _target(arguments)
    requests, source = _requests(arguments, target)
    with _open(target, device) as engine:
        meta = {"model": target.name, "tasks": [request.task for request in requests], **source}
        engine.start_trace({**meta, "command": _command(arguments, target)}, lookahead=arguments.lookahead)
        for note in engine.notes:
            _say(f"note: {note}")
        total = sum(request.max_tokens for request in requests)
        with tqdm(total=total, unit="tok", desc="recording", disable=not sys.stderr.isatty()) as bar:
            engine.on_pass(lambda passing: bar.update(passing.num_tokens))
            run_requests(engine, requests, arguments.batch)
        trace = engine.trace()
    write_trace(arguments.out, trace)
    print(_summary(trace, arguments.out))


_PARTS: dict[str, Part | None] = {"search": "search", "confirm": "confirm", "all": None}
_TEXT_ONLY = ("workload", "part", "task", "prompt_tokens", "output_tokens", "prefill")
_LEAST = {"max_tokens": 2, "prompt_tokens": 2, "output_tokens": 1, "generate": 1, "batch": 1, "lookahead": 0}


def _check(arguments: argparse.Namespace) -> None:
    given = {name for name, value in vars(arguments).items() if value not in (None, False)}
    if arguments.prompts and (wrong := [name for name in _TEXT_ONLY if name in given]):
        raise UsageError(f"{_flag(wrong[0])} is about text that is fed; it does not go with --prompts")
    if arguments.generate is not None and not arguments.prompts:
        raise UsageError("--generate is how far the model goes on from each prompt; it needs --prompts FILE")
    if arguments.prefill and arguments.output_tokens is not None:
        raise UsageError("--output-tokens are decoded one by one, which --prefill rules out; leave out one of them")
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"{_flag(name)} {value}: at least {least} is needed")
    try:
        if arguments.out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out {arguments.out} cannot be written: {error.strerror or error}") from error


def _target(arguments: argparse.Namespace) -> Target:
    from harness.demo.widen import bundled_model
    from runtime.engine import checkpoint_name
    from runtime.profile import Profile, checkpoint_of, load_profile, parse_overrides

    profile = load_profile(arguments.profile) if arguments.profile else Profile.default()
    known = arguments.model or checkpoint_of(profile)
    if arguments.profile and not known:
        raise UsageError(f"{arguments.profile} does not say where its model is; name the checkpoint as well (--model)")
    checkpoint = known or str(bundled_model())
    is_demo = Path(checkpoint).resolve() == bundled_model().resolve()
    name = DEMO_NAME if is_demo else checkpoint_name(checkpoint)
    overrides = parse_overrides(arguments.set)
    if arguments.batch > 1:
        overrides.setdefault("scheduler.group", arguments.batch)
    return Target(profile.with_overrides(overrides), checkpoint, name)


def _requests(arguments: argparse.Namespace, target: Target) -> tuple[list[PromptRequest], dict[str, Any]]:
    """What is run, and what the trace says of where it is from."""
    from harness.measure.recording import bounded

    found, source = (_from_prompts if arguments.prompts else _from_text)(arguments, target)
    requests = bounded(found, arguments.max_tokens)
    if not requests:
        raise UsageError(f"--max-tokens {arguments.max_tokens} is less than the first prompt has")
    return requests, source


def _from_prompts(arguments: argparse.Namespace, target: Target) -> tuple[list[PromptRequest], dict[str, Any]]:
    from harness.measure.recording import prompt_requests
    from runtime.model import read_tokenizer
    from runtime.prompts import check_requests, read_prompts

    prompts = read_prompts(arguments.prompts)
    found = prompt_requests(prompts, read_tokenizer(target.checkpoint), arguments.generate or NEW_TOKENS)
    check_requests(found, _context(target))
    return found, {"source": f"greedy generation after the prompts of {arguments.prompts.name}"}


def _from_text(arguments: argparse.Namespace, target: Target) -> tuple[list[PromptRequest], dict[str, Any]]:
    from harness.measure.recording import text_requests
    from harness.measure.workload import load_workload, passages
    from runtime.model import read_tokenizer

    workload, part = load_workload(arguments.workload), arguments.part or "search"
    prompt_tokens = arguments.prompt_tokens or (PREFILL_TOKENS if arguments.prefill else PROMPT_TOKENS)
    output_tokens = 0 if arguments.prefill else arguments.output_tokens or OUTPUT_TOKENS
    context = _context(target)
    if context is not None and prompt_tokens + output_tokens > context:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {output_tokens} more are above the {context} of the model's context"
        )
    chosen = _of_tasks(passages(workload, _PARTS[part]), arguments.task)
    found = text_requests(
        chosen, read_tokenizer(target.checkpoint), prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )
    if not found:
        raise UsageError(f"the workload {workload.name} has no text of 2 tokens or more in its part {part!r}")
    text = "held-out text of the demo" if arguments.workload is None else arguments.workload.name
    source = {
        "source": f"{text}, {'prefilled' if arguments.prefill else 'prompts prefilled, the rest decoded'}",
        "workload": {"name": workload.name, "sha256": workload.sha256, "part": part},
    }
    return found, source if arguments.workload else {**source, "licence": DEMO_LICENCE}


def _of_tasks(found: list[Passage], wanted: str | None) -> list[Passage]:
    if wanted is None:
        return found
    known, names = sorted({passage.task for passage in found}), wanted.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--task {unknown[0]!r}: no text of that task here; there is {', '.join(known)}")
    return [passage for passage in found if passage.task in names]


def _context(target: Target) -> int | None:
    from runtime.batching import context_of
    from runtime.model import read_config

    return context_of(read_config(target.checkpoint))


def _open(target: Target, device: str | None) -> Engine:
    """The whole model where it fits, which is faster; else with its experts offloaded. The routing is the same."""
    from runtime import build, machine
    from runtime.devices import find_device, free_bytes, is_gpu
    from runtime.facts import RESIDENT_FACTOR, describe

    facts, place = describe(target.checkpoint), find_device(device, target.profile)
    limit = free_bytes(place) if is_gpu(place) else machine.available_memory_bytes()
    where, are = f"memory of {place}" if is_gpu(place) else "memory", "are free"
    most = target.profile.max_memory_bytes
    if most is not None and most < limit:
        limit, are = most, "are allowed"
    size, room = machine.format_bytes(facts.model_bytes), machine.format_bytes(limit)
    if RESIDENT_FACTOR * facts.model_bytes <= limit:
        _say(f"{target.name}: all {size} in {where} ({room} {are})")
        return build.load_reference(target.profile, target.checkpoint, device=place)
    engine = build.load(target.profile, target.checkpoint, device=place)
    slots = f"{engine.profile.cache.slots} of {facts.num_experts_total} experts in it at a time"
    _say(f"{target.name}: {size} are too much for the {room} of {where}; offloaded, {slots}")
    return engine


def _command(arguments: argparse.Namespace, target: Target) -> str:
    """The command line without the folders of this machine."""
    words = ["python -m harness.record"]
    for name, value in vars(arguments).items():
        if value is None or value is False:
            continue
        if name == "model":
            words.append(f"--model {target.name}")
        elif name == "set":
            pairs = (setting.partition("=") for setting in value)
            words += [f"--set {key}={Path(of).name if '/' in of else of}" for key, _, of in pairs]
        elif value is True:
            words.append(_flag(name))
        else:
            words.append(f"{_flag(name)} {value.name if isinstance(value, Path) else value}")
    return " ".join(words)


def _summary(trace: RoutingTrace, out: Path) -> str:
    from runtime.machine import format_bytes

    num_decoded = 0 if trace.phase is None else int(trace.phase.sum())
    shape = f"{trace.num_tokens} tokens x {trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts} experts"
    tasks = sorted(set(trace.meta["tasks"]))
    lines = [
        f"{out}: {format_bytes(out.stat().st_size)}; {shape}",
        f"{len(set(trace.request.tolist()))} requests ({', '.join(tasks)}); "
        f"{trace.num_tokens - num_decoded} tokens prefilled, {num_decoded} decoded",
    ]
    predictors = "none,previous_token"
    if trace.predicted is not None:
        lines.append("gate lookahead: the likeliest {1} experts of {0} layers ahead".format(*trace.predicted.shape[2:]))
        predictors += ",gate_lookahead"
    batch = "" if num_decoded else " --batch 1"
    lines += [
        f"next: python -m harness.simulate --trace {out}{batch} --predictor {predictors}",
        f"      python -m harness.fit routing_path --trace {out} --out {out.with_suffix('.routing_path.safetensors')}",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.record", description=__doc__)
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the profile's, else the bundled demo")
    parser.add_argument("--profile", type=Path, help="profile to run with (a .yaml file)")
    add_device_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the trace to write (.npz)")
    parser.add_argument("--workload", type=Path, help="JSON lines of text; default: the demo's held-out text")
    parser.add_argument(
        "--part",
        choices=("search", "confirm", "all"),
        help="which passages (search); harness.tune confirms on the rest",
    )
    parser.add_argument("--task", metavar="NAME,…", help="only the passages of these tasks")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help=f"of each text, prefilled ({PROMPT_TOKENS})")
    parser.add_argument("--output-tokens", type=int, metavar="N", help=f"of each text, decoded ({OUTPUT_TOKENS})")
    parser.add_argument(
        "--prefill",
        action="store_true",
        help=f"each text as one prompt, {PREFILL_TOKENS} tokens or --prompt-tokens: much faster, nothing is decoded",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt": record greedy generation'
    )
    parser.add_argument("--generate", type=int, metavar="N", help=f"new tokens after each prompt ({NEW_TOKENS})")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests computed together (%(default)s)")
    parser.add_argument(
        "--lookahead", type=int, default=2, metavar="DEPTH", help="layers ahead of the gate lookahead; 0: none (2)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    return parser


if __name__ == "__main__":
    sys.exit(main())
