"""Offloaded against resident logits, bit by bit: `python -m harness.measure.exactness --device cuda:0 --out FILE`.

The bundled demo prefills held-out text and decodes more of it, through every pair of kernels and with several numbers
of slots, at 25 % of them with prefetch, too. One JSON file, written anew after every configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main
from runtime.files import write_atomic

if TYPE_CHECKING:
    import torch

    from harness.measure.workload import TokenRequest

KERNELS = (("grouped_mm", "eager"), ("grouped_mm", "grouped_mm"), ("eager", "eager"))
ON_DEMAND = {"prefetch.depth": 0, "predictor.kind": "none"}
AHEAD = {"prefetch.depth": 2, "prefetch.on_trial": False}
CACHES: tuple[dict[str, Any], ...] = (
    *({"cache.slots": slots, **ON_DEMAND} for slots in (1, 4, "25%", "100%")),
    {"cache.slots": "25%", **AHEAD},
)
PROMPT_TOKENS, OUTPUT_TOKENS = 96, 17


def compare(
    device: str, kernels: Sequence[tuple[str, str]] = KERNELS, caches: Sequence[dict[str, Any]] = CACHES
) -> Iterator[dict[str, Any]]:
    """A row per configuration: how many of its logits are the resident model's, and the largest difference.

    Every configuration runs twice: with slots that are empty, and as the first run left them.
    """
    import runtime
    from harness.demo.widen import bundled_model

    model = bundled_model()
    request = _request(model)
    for prefill, decode in kernels:
        own = {"compute.prefill": prefill, "compute.decode": decode}
        with runtime.load_reference(model, device=device, overrides=own) as reference:
            expected = _logits(reference.model, request)
        for cache in caches:
            with runtime.load(model, device=device, overrides={**own, **cache}) as engine:
                runs = [_logits(engine.model, request) for _ in range(2)]
                counts = {"num_loads": engine.stats().num_loads, "num_slots": engine.num_slots}
            yield {"overrides": {**own, **cache}, **counts, **_difference(runs, expected)}


def _request(model: Path) -> TokenRequest:
    from harness.measure.workload import cut, load_workload
    from runtime.model import read_tokenizer

    tokenizer = read_tokenizer(str(model))
    (request,) = cut(
        load_workload(),
        tokenizer,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        num_requests=1,
        part="confirm",
    )
    return request


def _logits(model: Any, request: TokenRequest) -> torch.Tensor:
    """Of the prompt's last token and of every token that is fed after it, [tokens, vocabulary]."""
    import torch

    from harness.measure.runner import Decoder

    with torch.inference_mode():
        decoder = Decoder(model)
        found = [decoder.logits(request.prompt_ids)]
        found += [decoder.logits([token]) for token in request.output_ids[:-1]]
        return torch.stack(found).cpu()


def _difference(runs: Sequence[torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
    largest = max((run.float() - expected.float()).abs().max().item() for run in runs)
    return {
        "num_logits": len(runs) * expected.numel(),
        "num_equal": sum(int((run == expected).sum()) for run in runs),
        "largest_difference": largest,
        "is_exact": all(run.equal(expected) for run in runs),
    }


def _run(options: argparse.Namespace) -> int:
    from harness.measure.provenance import provenance
    from runtime.devices import find_device
    from runtime.profile import Profile

    device = named_device(options) or "cuda:0"
    find_device(device, Profile.default())
    head = {**provenance("harness.measure.exactness", datetime.now(UTC)), "device": device}
    rows: list[dict[str, Any]] = []
    for row in compare(device):
        rows.append(row)
        try:
            write_atomic(options.out, json.dumps({**head, "rows": rows}, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"--out {options.out}: cannot be written: {error.strerror or error}") from error
    wrong = [row for row in rows if not row["is_exact"]]
    for row in wrong:
        print(f"not exact: {row}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} configurations equal the resident model to the bit")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.measure.exactness", description=__doc__.split("\n\n")[0])
    add_device_options(parser, "default: cuda:0")
    parser.add_argument("--out", type=Path, default=Path("results/gpu/exactness.json"), help="(default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where logits differ."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
