"""Generate text with a profile: `python -m runtime.generate --profile P --prompt "…"`, or many texts in batches:
`python -m runtime.generate --profile P --prompts FILE.jsonl`. SIGTERM or Ctrl-C ends it after the running pass, with
what there is so far; the exit code is then 143 or 130."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.answers import answer, batch_summary
from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable
from runtime.interrupt import StopRequest
from runtime.prompts import Prompt, PromptRequest, RequestResult, check_requests, read_prompts

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from runtime.engine import Engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.generate", description=__doc__)
    parser.add_argument("--profile", metavar="FILE|NAME", help="profile written by harness.tune")
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
    add_device_options(parser)
    parser.add_argument(
        "--numerics",
        metavar="NAME",
        help="exact; or equivalent: a GPU's misses may be computed on the CPU, which rounds otherwise (miss: auto, "
        "unless the profile or --set says how); default: the profile's",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the routing as a trace (.npz)")
    parser.add_argument(
        "--save-predictor",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep what the predictor learns for the next start; default file: the profile's predictor.artifact",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a profile that is stale or made for another model"
    )
    parser.add_argument("--probe", action="store_true", help="measure the bandwidth of this machine before trusting it")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics meanwhile; 0: any")
    parser.add_argument("--metrics-address", default="127.0.0.1", metavar="IP", help="of --metrics-port (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text instead of text")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.profile is None and options.model is None:
        raise UsageError("name what to run: --profile FILE (from harness.tune) or --model CHECKPOINT")
    for name in ("max_new_tokens", "concurrency"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if options.prompts is None and (options.scheduler or options.concurrency):
        raise UsageError("--scheduler and --concurrency are for several prompts: give them with --prompts FILE")
    check_writable("--trace", options.trace)
    if options.prompt == "-":
        options.prompt = sys.stdin.read()
    prompts = [] if options.prompts is None else read_prompts(options.prompts)
    # Imported late: --help and mistakes in the arguments answer at once.
    from transformers.utils.logging import disable_progress_bar

    from runtime.build import load
    from runtime.profile import find_profile, parse_overrides
    from runtime.trace import write_trace

    disable_progress_bar()
    if options.profile:
        options.profile = find_profile(options.profile)
    source = options.profile or options.model
    model = options.model if options.profile else None
    device = named_device(options)
    overrides = _with_numerics(options, device, parse_overrides(options.set))
    if options.scheduler:
        overrides["scheduler.kind"] = options.scheduler
    requests = _requests(options, prompts) if prompts else []
    with (
        _served_metrics(options) as registry,
        load(source, model, overrides=overrides, device=device, strict=options.strict, probe=options.probe) as engine,
        StopRequest().listening("the running pass ends", (signal.SIGINT, signal.SIGTERM)) as stop,
    ):
        told = _tell(engine.notes)
        saved_to = None if options.save_predictor is None else engine.predictor_file(options.save_predictor or None)
        if options.trace:
            engine.start_trace()
        if registry is not None:
            from runtime.metrics import register

            register(engine, registry)
        is_complete = (
            _generate_all(engine, requests, options, stop) if requests else _generate_one(engine, options, stop)
        )
        _tell(engine.notes[told:])
        if options.trace:
            write_trace(options.trace, engine.trace())
        if saved_to:
            engine.save_predictor(saved_to)
        _say(engine.stats().line())
        return 0 if is_complete else stop.exit_code


def _with_numerics(options: argparse.Namespace, device: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` with --numerics and what goes with it, where they do not say so themselves."""
    from runtime.devices import find_device, is_gpu
    from runtime.machine import cpu_count
    from runtime.profile import Profile, load_profile

    if options.numerics is None:
        return overrides
    implied: dict[str, Any] = {"numerics": options.numerics}
    if options.numerics == "exact":
        implied["miss"] = "copy"
    elif options.numerics == "equivalent":
        profile = load_profile(options.profile) if options.profile else Profile.default()
        if profile.miss == "copy":
            implied["miss"] = "auto"
            if "compute.threads" not in profile.fixed and is_gpu(find_device(device, profile)):
                implied["compute.threads"] = cpu_count()  # on which results of a GPU did not depend before
    return {**implied, **overrides}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _served_metrics(options: argparse.Namespace) -> Iterator[CollectorRegistry | None]:
    """The registry that is served, if one is; before the model is loaded, so that a port in use is told at once."""
    if options.metrics_port is None:
        yield None
        return
    from runtime.metrics import serve

    with serve(options.metrics_port, options.metrics_address) as server:
        _say(f"metrics    {server.url}")
        yield server.registry


def _tell(notes: Sequence[str]) -> int:
    """Print `notes` for people; returns how many there are."""
    for note in notes:
        _say(f"note: {note}")
    return len(notes)


def _requests(options: argparse.Namespace, prompts: Sequence[Prompt]) -> list[PromptRequest]:
    """The prompts as token ids, checked against the model's context before its weights are loaded."""
    from runtime.batching import context_of
    from runtime.facts import describe
    from runtime.model import read_tokenizer
    from runtime.profile import checkpoint_of, load_profile

    checkpoint = options.model or checkpoint_of(load_profile(options.profile))
    if checkpoint is None:
        return []  # loading will say what is missing
    context = context_of(describe(checkpoint).config)
    tokenizer = read_tokenizer(checkpoint)
    requests = [
        PromptRequest(
            id=prompt.id,
            prompt_ids=tuple(tokenizer(prompt.text, verbose=False)["input_ids"]),
            max_new_tokens=prompt.max_new_tokens or options.max_new_tokens,
            task=prompt.task,
            slo_s=prompt.slo_s,
        )
        for prompt in prompts
    ]
    check_requests(requests, context)
    return requests


def _generate_all(
    engine: Engine, requests: Sequence[PromptRequest], options: argparse.Namespace, stop: StopRequest
) -> bool:
    """Run `requests` and print each as soon as it and all before it are complete; False if it was stopped before."""
    from runtime.serving import run_batch

    done: dict[str, RequestResult] = {}
    coming = list(reversed(requests))

    def on_finish(result: RequestResult) -> None:
        done[result.id] = result
        while coming and coming[-1].id in done:
            request = coming.pop()
            print(answer(engine.tokenizer, request, done.pop(request.id), options.json), flush=True)

    run = run_batch(
        engine,
        requests,
        concurrency=options.concurrency,
        sample=options.sample,
        seed=options.seed,
        on_finish=on_finish,
        stop=stop,
    )
    for request in reversed(coming):  # after one that a stop left without a token
        print(answer(engine.tokenizer, request, done.get(request.id), options.json), flush=True)
    if options.json:
        print(json.dumps({"summary": {**run.as_dict(), **engine.stats().as_dict()}}))
    else:
        _say(f"{batch_summary(run)}\n{engine.stats().summary()}")
    return len(run.requests) == len(requests) and not any(result.is_cancelled for result in run.requests)


def _generate_one(engine: Engine, options: argparse.Namespace, stop: StopRequest) -> bool:
    """Print how the prompt goes on; False if that was stopped before its end."""
    import torch
    from transformers import TextStreamer

    from runtime.batching import context_of

    inputs: Any = engine.tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    inputs = inputs.to(engine.model.device)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    if num_prompt_tokens == 0:
        raise UsageError("the prompt is empty; give at least one token of text")
    asked = PromptRequest("--prompt", tuple(inputs["input_ids"][0].tolist()), options.max_new_tokens)
    check_requests([asked], context_of(engine.model.config))
    torch.manual_seed(options.seed)
    was_stopped = False

    def should_stop(ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        nonlocal was_stopped
        was_stopped = stop() and ids.shape[1] - num_prompt_tokens < options.max_new_tokens
        return was_stopped

    model: Any = engine.model
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.sample,
            streamer=None if options.json else TextStreamer(engine.tokenizer, skip_special_tokens=True),
            stopping_criteria=[should_stop],
        )
    new, stats = output[0, num_prompt_tokens:], engine.stats()
    if not options.json:
        _say(f"\n{stats.summary()}")
        return not was_stopped
    ttft_s, tpot_s = stats.latency.ttft.mean, stats.latency.tpot.mean
    result = {
        "text": engine.tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new.tolist(),
        "interrupted": was_stopped,
        "num_prompt_tokens": num_prompt_tokens,
        "ttft_ms": ttft_s and 1e3 * ttft_s,
        "tpot_ms": tpot_s and 1e3 * tpot_s,
        **stats.as_dict(),
    }
    print(json.dumps(result))
    return not was_stopped


if __name__ == "__main__":
    sys.exit(main())
