"""What a profile says of its origin: figures, machine, versions."""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measure.provenance import commit
from harness.measure.stats import median
from harness.search.outcome import Measurement
from runtime import machine
from runtime.profile import Bandwidth, Match, ModelIdentity, Objectives, Provenance, portable

if TYPE_CHECKING:
    from harness.search.gpu import Gpu

_PACKAGES = ("expertflow", "torch", "transformers", "optuna", "numba")
_BANDWIDTH_TOLERANCE = 0.5
"""Of the bandwidth measured at expert size: below this share of it, where experts are kept should be tuned anew."""


def objectives(runs: Sequence[Measurement]) -> Objectives:
    """Medians over `runs` (at least one), and the highest peak."""

    def middle(values: Sequence[Any]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return Objectives(
        latency_ms_p50=middle([run.latency_ms_p50 for run in runs]),
        tokens_per_s=middle([run.tokens_per_s for run in runs]),
        ttft_ms_p50=middle([run.ttft_ms_p50 for run in runs]),
        tpot_ms_p50=middle([run.tpot_ms_p50 for run in runs]),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        bytes_per_token=middle([run.stats.get("bytes_per_token") for run in runs]),
        hit_rate=middle([run.stats.get("hit_rate") for run in runs]),
    )


def match(model: ModelIdentity, bandwidth_bytes_per_s: float, gpu: Gpu | None = None) -> Match:
    """This machine, or its GPU, and the model that was tuned."""
    return Match(
        device="cpu" if gpu is None else gpu.kind,
        memory_total_bytes=machine.total_memory_bytes() if gpu is None else gpu.memory_total_bytes,
        bandwidth_at_expert_size_bytes_per_s=Bandwidth(min=float(round(_BANDWIDTH_TOLERANCE * bandwidth_bytes_per_s))),
        model=model,
    )


_ABSOLUTE = re.compile(r"(?<!\S)/\S*/")  # folders of a path


def provenance(model: str, command: str, hardware: Mapping[str, str | int] | None = None) -> Provenance:
    """Who made this, with what, when; `hardware` is by default this machine without a GPU.

    Absolute paths in `command` become names: where the machine keeps its files is nobody's business.
    """
    from harness.demo.widen import command_of  # torch

    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=portable(model),
        model_command=command_of(Path(model)),
        versions=versions(),
        commit=commit(),
        hardware=dict(machine.fingerprint() if hardware is None else hardware),
        command=_ABSOLUTE.sub("", command),
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
