"""Generate text with a profile: `python -m runtime.generate --profile P --prompt "…"`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from runtime.errors import UsageError, cli_main
from runtime.vocabulary import Phase


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.generate", description=__doc__)
    parser.add_argument("--profile", type=Path, help="profile written by harness.tune")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the one that the profile names")
    parser.add_argument("--prompt", required=True, help="text to go on from; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the routing as a trace (.npz)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.profile is None and options.model is None:
        raise UsageError("name what to run: --profile FILE (from harness.tune) or --model CHECKPOINT")
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: at least 1 is needed")
    # Imported late: --help and mistakes in the arguments answer at once.
    from transformers.utils.logging import disable_progress_bar

    from runtime.build import load
    from runtime.profile import parse_overrides
    from runtime.trace import write_trace

    disable_progress_bar()
    source = options.profile or options.model
    model = options.model if options.profile else None
    with load(source, model, overrides=parse_overrides(options.set)) as engine:
        for note in () if options.json else engine.notes:
            print(f"note: {note}", file=sys.stderr)
        if options.trace:
            engine.start_trace()
        result = _generate(engine, options)
        if options.trace:
            write_trace(options.trace, engine.trace())
        if options.json:
            print(json.dumps(result))
        else:
            print(_summary(result, engine.stats()), file=sys.stderr)


def _generate(engine: Any, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import TextStreamer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    inputs = engine.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty; give at least one token of text")
    torch.manual_seed(options.seed)
    times = _PassTimes(engine)
    with torch.inference_mode():
        output = engine.model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.sample,
            streamer=None if options.json else TextStreamer(engine.tokenizer, skip_special_tokens=True),
        )
    times.end()
    new = output[0, inputs["input_ids"].shape[1] :]
    return {
        "text": engine.tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new.tolist(),
        "num_prompt_tokens": inputs["input_ids"].shape[1],
        "ttft_ms": times.ttft_ms,
        "tpot_ms": times.tpot_ms,
        **engine.stats().as_dict(),
    }


class _PassTimes:
    """When passes began: the first token is out when the second pass begins (or at the end)."""

    def __init__(self, engine: Any) -> None:
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


def _summary(result: dict[str, Any], stats: Any) -> str:
    tpot = result["tpot_ms"]
    speed = "" if tpot is None else f", TPOT {tpot:.1f} ms ({1e3 / tpot:.1f} tokens/s)"
    return f"\nTTFT {result['ttft_ms']:.0f} ms{speed}\n{stats.summary()}"


if __name__ == "__main__":
    sys.exit(main())
