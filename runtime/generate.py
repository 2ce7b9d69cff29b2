"""Generate text with a profile: `python -m runtime.generate --profile P --prompt "…"`, or many texts in batches:
`python -m runtime.generate --profile P --prompts FILE.jsonl`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UsageError, cli_main
from runtime.files import check_writable
from runtime.prompts import Prompt, PromptRequest, RequestResult, check_requests, read_prompts
from runtime.vocabulary import Phase

if TYPE_CHECKING:
    from runtime.batch_stats import BatchResult
    from runtime.engine import Engine
    from runtime.telemetry import EngineStats


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.generate", description=__doc__)
    parser.add_argument("--profile", type=Path, help="profile written by harness.tune")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the one that the profile names")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to go on from; - reads it from standard input")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt", "id", "task", "slo_ms", "max_new_tokens"}, all but the first optional; '
        "they run in batches of scheduler.group",
    )
    parser.add_argument("--scheduler", metavar="NAME", help="which prompts run together; default: the profile's")
    parser.add_argument("--concurrency", type=int, metavar="N", help="prompts outstanding at a time; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of prompts that do not say")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the routing as a trace (.npz)")
    parser.add_argument(
        "--save-predictor",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep what the predictor learns for the next start; default file: the profile's predictor.artifact",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per text instead of text")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.profile is None and options.model is None:
        raise UsageError("name what to run: --profile FILE (from harness.tune) or --model CHECKPOINT")
    for name in ("max_new_tokens", "concurrency"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if options.prompts is None and (options.scheduler or options.concurrency):
        raise UsageError("--scheduler and --concurrency are for several prompts: give them with --prompts FILE")
    check_writable("--trace", options.trace)
    prompts = [] if options.prompts is None else read_prompts(options.prompts)
    # Imported late: --help and mistakes in the arguments answer at once.
    from transformers.utils.logging import disable_progress_bar

    from runtime.build import load
    from runtime.profile import parse_overrides
    from runtime.trace import write_trace

    disable_progress_bar()
    source = options.profile or options.model
    model = options.model if options.profile else None
    overrides = parse_overrides(options.set)
    if options.scheduler:
        overrides["scheduler.kind"] = options.scheduler
    requests = _requests(options, prompts) if prompts else []
    with load(source, model, overrides=overrides) as engine:
        told = _tell(engine.notes, options)
        saved_to = None if options.save_predictor is None else engine.predictor_file(options.save_predictor or None)
        if options.trace:
            engine.start_trace()
        if requests:
            _generate_all(engine, requests, options)
        else:
            _generate_one(engine, options)
        _tell(engine.notes[told:], options)
        if options.trace:
            write_trace(options.trace, engine.trace())
        if saved_to:
            engine.save_predictor(saved_to)


def _tell(notes: Sequence[str], options: argparse.Namespace) -> int:
    """Print `notes` for people; returns how many there are."""
    for note in () if options.json else notes:
        print(f"note: {note}", file=sys.stderr)
    return len(notes)


def _requests(options: argparse.Namespace, prompts: Sequence[Prompt]) -> list[PromptRequest]:
    """The prompts as token ids, checked against the model's context before its weights are loaded."""
    from runtime.batching import context_of
    from runtime.facts import describe
    from runtime.model import read_tokenizer
    from runtime.profile import load_profile

    checkpoint = options.model
    if checkpoint is None:
        provenance = load_profile(options.profile).provenance
        checkpoint = provenance.model if provenance is not None else None
    if checkpoint is None:
        return []  # loading will say what is missing
    context = context_of(describe(checkpoint).config)
    tokenizer = read_tokenizer(checkpoint)
    requests = [
        PromptRequest(
            id=prompt.id,
            prompt_ids=tuple(tokenizer(prompt.text)["input_ids"]),
            max_new_tokens=prompt.max_new_tokens or options.max_new_tokens,
            task=prompt.task,
            slo_s=prompt.slo_s,
        )
        for prompt in prompts
    ]
    check_requests(requests, context)
    return requests


def _generate_all(engine: Engine, requests: Sequence[PromptRequest], options: argparse.Namespace) -> None:
    """Run `requests` and print each as soon as it and all before it are complete."""
    from runtime.serving import run_batch

    done: dict[str, RequestResult] = {}
    coming = list(reversed(requests))

    def on_finish(result: RequestResult) -> None:
        done[result.id] = result
        while coming and coming[-1].id in done:
            request = coming.pop()
            print(_text_of(engine, request, done.pop(request.id), options.json), flush=True)

    run = run_batch(
        engine,
        requests,
        concurrency=options.concurrency,
        sample=options.sample,
        seed=options.seed,
        on_finish=on_finish,
    )
    if options.json:
        print(json.dumps({"summary": {**run.as_dict(), **engine.stats().as_dict()}}))
    else:
        print(f"{_batch_summary(run)}\n{engine.stats().summary()}", file=sys.stderr)


def _text_of(engine: Engine, request: PromptRequest, result: RequestResult, as_json: bool) -> str:
    """One finished request, for people or as JSON."""
    text = engine.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)
    if not as_json:
        tpot = "" if result.tpot_ms is None else f", TPOT {result.tpot_ms:.1f} ms"
        times = f"TTFT {result.ttft_ms:.0f} ms{tpot}, {result.num_tokens} tokens"
        return f"== {result.id} ({times})\n{text}\n"
    return json.dumps(
        {
            "id": result.id,
            "task": result.task,
            "text": text,
            "token_ids": list(result.token_ids),
            "num_prompt_tokens": len(request.prompt_ids),
            "ttft_ms": result.ttft_ms,
            "tpot_ms": result.tpot_ms,
            "latency_ms_per_token": result.latency_ms,
            "total_ms": result.total_ms,
            "slo_ms": None if request.slo_s is None else 1e3 * request.slo_s,
            "slo_met": None if request.slo_s is None else result.total_ms <= 1e3 * request.slo_s,
        }
    )


def _batch_summary(run: BatchResult) -> str:
    decode = ""
    if run.decode_batch is not None and run.distinct_experts is not None:
        decode = f", {run.decode_batch:.1f} requests and {run.distinct_experts:.1f} experts per layer in a decode pass"
    return (
        f"requests   {len(run.requests)}, {run.tokens_per_s:.1f} tokens/s{decode}\n"
        f"planning   {run.planning_s:.3f} s, {run.hidden_planning_s:.3f} s of it beside a pass"
    )


def _generate_one(engine: Engine, options: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    inputs: Any = engine.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty; give at least one token of text")
    torch.manual_seed(options.seed)
    times = _PassTimes(engine)
    model: Any = engine.model
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.sample,
            streamer=None if options.json else TextStreamer(engine.tokenizer, skip_special_tokens=True),
        )
    times.end()
    new = output[0, inputs["input_ids"].shape[1] :]
    if not options.json:
        print(_summary(times, engine.stats()), file=sys.stderr)
        return
    result = {
        "text": engine.tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new.tolist(),
        "num_prompt_tokens": inputs["input_ids"].shape[1],
        "ttft_ms": times.ttft_ms,
        "tpot_ms": times.tpot_ms,
        **engine.stats().as_dict(),
    }
    print(json.dumps(result))


class _PassTimes:
    """When passes began: the first token is out when the second pass begins (or at the end)."""

    def __init__(self, engine: Engine) -> None:
        self._marks = [time.perf_counter()]
        engine.on_pass(
            lambda passing: self._marks.append(time.perf_counter()) if passing.phase is Phase.DECODE else None
        )

    def end(self) -> None:
        self._marks.append(time.perf_counter())

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return (self._marks[1] - self._marks[0]) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per further token; None when there was none."""
        steps = len(self._marks) - 2
        return (self._marks[-1] - self._marks[1]) * 1e3 / steps if steps else None


def _summary(times: _PassTimes, stats: EngineStats) -> str:
    tpot = times.tpot_ms
    speed = "" if tpot is None else f", TPOT {tpot:.1f} ms ({1e3 / tpot:.1f} tokens/s)"
    return f"\nTTFT {times.ttft_ms:.0f} ms{speed}\n{stats.summary()}"


if __name__ == "__main__":
    sys.exit(main())
