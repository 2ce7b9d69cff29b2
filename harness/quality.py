"""What a profile costs in quality: `python -m harness.quality --profile P [--write]`.

The same held-out text goes through the engine and through the exact model; their next-token distributions are compared.
An exact profile costs nothing, to the bit. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from harness.measure.divergence import Divergence
    from harness.measure.workload import TokenRequest, Workload
    from runtime.engine import Engine

TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS = 2048, 64, 64


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    # Imported late: --help and mistakes in the arguments answer at once.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    import runtime
    from harness.demo.widen import bundled_model
    from harness.measure.divergence import compare
    from harness.measure.workload import load_workload
    from runtime.profile import Profile, parse_overrides

    disable_progress_bar()
    source = arguments.profile or Profile.default()
    model = arguments.model or (None if arguments.profile else str(bundled_model()))
    overrides, workload = parse_overrides(arguments.set), load_workload(arguments.workload)
    with runtime.load(source, model, overrides=overrides, device=named_device(arguments)) as ours:
        if arguments.write:
            _check_runs(arguments.profile, ours)
        requests = _requests(arguments, workload, ours)
        for note in ours.notes:
            if "harness.quality" not in note:  # that it was not measured: it is now
                _say(f"note: {note}")
        routes = _Routes(ours)
        with _exact(ours) as exact:
            for engine in (exact, ours):
                _realign(engine.model)
            total = sum(len(request.output_ids) for request in requests)
            with tqdm(total=total, unit="tok", desc="comparing", disable=not sys.stderr.isatty()) as bar:
                found = compare(exact, ours, requests, bar.update)
        result = _result(ours, found, routes, requests)
    if not arguments.json:
        print(_text(result))
    if arguments.write:
        _write(arguments.profile, found)
        _say(f"{arguments.profile}: evidence written")
    print(json.dumps(result))


_LEAST = {"tokens": 1, "prompt_tokens": 2, "output_tokens": 1}


def _check(arguments: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least} is needed")
    if arguments.write and not arguments.profile:
        raise UsageError("--write puts the figures into a profile: name it with --profile FILE")
    if arguments.write and arguments.profile.exists() and not os.access(arguments.profile.parent, os.W_OK):
        raise UsageError(f"--write: {arguments.profile.parent} cannot be written to; copy the profile elsewhere")
    if arguments.write and arguments.set:
        raise UsageError("--write is for figures of the profile as it stands; --set changes it: leave out one of them")


def _check_runs(path: Path, ours: Engine) -> None:
    """What is written into a profile are figures of that profile."""
    if ours.match is not None and ours.match.level == "rejected":
        why = "; ".join(ours.match.reasons)
        raise UsageError(f"--write: something else runs here instead of {path} ({why}); write where the profile runs")


def _requests(arguments: argparse.Namespace, workload: Workload, engine: Engine) -> tuple[TokenRequest, ...]:
    """Texts of equal length; the last one is cut short where fewer tokens are left to compare."""
    from dataclasses import replace

    from harness.measure.workload import cut
    from runtime.batching import context_of

    length, context = arguments.prompt_tokens + arguments.output_tokens, context_of(engine.model.config)
    if context is not None and length > context:
        raise UsageError(f"texts of {length} tokens are above the {context} of the model's context")
    num_requests = -(-arguments.tokens // arguments.output_tokens)
    *whole, last = cut(
        workload,
        engine.tokenizer,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        num_requests=num_requests,
        part="confirm",
    )
    num_left = arguments.tokens - arguments.output_tokens * len(whole)
    return (*whole, replace(last, output_ids=last.output_ids[:num_left]))


def _exact(ours: Engine) -> Engine:
    """The whole model where it fits beside `ours`; else another engine with exact numerics: equal to the bit."""
    from runtime import build, machine
    from runtime.devices import free_bytes, is_gpu
    from runtime.facts import BUFFER_BYTES, RESIDENT_FACTOR, cuda_buffer_bytes, describe, planned_context

    profile, facts, device = ours.profile, describe(ours.source), ours.model.device
    if is_gpu(device):
        room, buffer_bytes = free_bytes(device), cuda_buffer_bytes(facts, planned_context(profile))
    else:
        # Slots that nothing was loaded into yet do not show in what is free.
        room = machine.available_memory_bytes() - int(profile.cache.slots or 0) * facts.slot_bytes
        buffer_bytes = BUFFER_BYTES
    if RESIDENT_FACTOR * facts.model_bytes <= room:
        return build.load_reference(profile, ours.source, device=device)
    slots = machine.slots_that_fit(room, facts.dense_bytes, facts.slot_bytes, 0, buffer_bytes)
    _say(f"the whole model does not fit beside the engine; the exact one is offloaded too, with {slots} slots")
    overrides = {"cache.slots": min(slots, facts.num_experts_total), "limits": None}
    return build.load(profile, ours.source, overrides={**overrides, **_EXACT}, device=device)


_EXACT = {"numerics": "exact", "miss": "copy"}


def _realign(model: Any) -> None:
    """Give every float32 tensor aligned memory of its own: MKL rounds differently for those that lie in a mapped file
    wherever they happen to."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.clone()


class _Routes:
    """Counts an engine's choices, by token and rank, in the passes in which its numerics may change them."""

    def __init__(self, engine: Engine) -> None:
        from runtime.substitute import PHASES

        self.count = 0
        self._passes, self._phases = engine.passes, PHASES.get(engine.profile.numerics, ())
        engine.observe_routing(self._observe)

    def _observe(self, layer: int, choice: npt.NDArray[np.int64], weights: Any) -> None:
        if self._passes.current.phase in self._phases:
            self.count += choice.size


def _result(engine: Engine, found: Divergence, routes: _Routes, requests: Sequence[TokenRequest]) -> dict[str, Any]:
    from runtime.engine import checkpoint_name

    stats = engine.stats()
    num_substituted = stats.cache.num_substituted
    return {
        "model": checkpoint_name(engine.source),
        "device": str(engine.model.device),
        "numerics": engine.profile.numerics,
        "slots": engine.profile.cache.slots,
        "num_texts": len(requests),
        **found.as_dict(),
        "num_substituted": num_substituted,
        "num_computed": stats.cache.num_computed,
        "substituted_share": num_substituted / routes.count if routes.count else 0.0,
        "stats": stats.as_dict(),
    }


def _text(result: dict[str, Any]) -> str:
    from runtime.profile import LOSSY

    num_texts, num_computed = result["num_texts"], result["num_computed"]
    lines = [
        f"{result['model']} on {result['device']}, numerics {result['numerics']}, against the exact model: "
        f"{result['num_tokens']} tokens of {num_texts} text{'' if num_texts == 1 else 's'}",
        f"KL divergence    {result['kl_nats']:.6g} nats per token",
        f"perplexity       {result['perplexity']:.4f}, exact {result['perplexity_exact']:.4f}: "
        f"x{result['perplexity_ratio']:.4f}",
        f"likeliest token  the same for {result['top1_agreement']:.2%}",
        f"logits           differ by up to {result['max_logit_error']:.4g}",
    ]
    if result["numerics"] in LOSSY:
        share, num_substituted = result["substituted_share"], result["num_substituted"]
        lines.append(f"substituted      {share:.2%} of the choices ({num_substituted})")
    if num_computed or result["numerics"] == "equivalent":
        lines.append(f"computed         {num_computed} of {result['stats']['num_misses']} misses, on the CPU")
    return "\n".join(lines)


def _write(path: Path, found: Divergence) -> None:
    from runtime.profile import Evidence, load_profile, save_profile

    profile = load_profile(path)
    names = ("kl_nats", "perplexity_ratio", "top1_agreement", "max_logit_error")
    figures = {name: getattr(found, name) for name in names}
    evidence = (profile.evidence or Evidence()).model_copy(update=figures)
    save_profile(profile.model_copy(update={"evidence": evidence}), path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.quality", description=__doc__)
    parser.add_argument("--profile", type=Path, help="profile to measure (a .yaml file); default: the default profile")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the profile's, else the bundled demo")
    add_device_options(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    parser.add_argument("--workload", type=Path, help="JSON lines of text; default: the demo's held-out text")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="to compare in all (%(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, metavar="N", help="of each text, prefilled (%(default)s)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=OUTPUT_TOKENS, metavar="N", help="of each text, compared (%(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="write the figures into the profile's evidence")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
