"""What was measured on a GPU, for people: a line per system, the goals, and Markdown tables of a folder of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.measure.gpu_figures import NOT_TAKEN, RATIO_HOW, USUAL
from runtime.errors import UsageError
from runtime.machine import format_bytes

JsonDict = dict[str, Any]

_CHECK = "check.json"


def system_line(name: str, found: JsonDict) -> str:
    """Its figures, as far as there are any, and its error."""
    parts = [f"{name:<17}"]
    if "tokens_per_s" in found:
        parts[0] += f"{found['tokens_per_s']['median']:9.2f} tokens/s {found['tpot_ms']:9.2f} ms"
    if found.get("hit_rate") is not None:
        parts.append(f"{format_bytes(found['bytes_per_token'])} per token, {found['hit_rate']:.1%} hits")
    if found.get("replay_ms_per_token") is not None:
        parts.append(f"copies alone {found['replay_ms_per_token']:.2f} ms")
    if found.get("ladder"):
        parts.append(f"{_ratio(found['ladder']['fraction'])} of attainable")
    if found.get("prefill"):
        parts.append(f"prefill {1e3 * found['prefill']['seconds']:.0f} ms")
    parts += [f"WRONG: {flag}" for part in ("ladder", "prefill") if (flag := (found.get(part) or {}).get("flag"))]
    if "memory" in found:
        memory = found["memory"]
        parts.append(f"{format_bytes(memory['peak_gpu_bytes'])} of GPU memory")
        parts.append(f"{format_bytes(memory['peak_host_bytes'])} of the host's")
    if "cut_off" in found:
        parts.append("cut off by the end of the time")
    if "error" in found:
        parts.append(f"FAILED: {found['error']}")
    return ", ".join(parts)


def goal_lines(goals: Iterable[JsonDict]) -> Iterator[str]:
    """One for each goal: met, not met or not taken, and by which value."""
    for one in goals:
        value = "" if one["value"] is None else f"{one['value']:.4g}"
        note = f"  ({one['note']})" if one["note"] else ""
        yield f"{one['status']:<10}{one['goal']:<58}{value:>8}  wanted {one['wanted']}{note}"


def markdown(folder: Path, shapes: Sequence[str]) -> str:
    """Tables of the results in `folder`, one section for each shape and for whatever else was measured there.

    Raises:
        UsageError: there is no such folder, or a file in it is no result.
    """
    if not folder.is_dir():
        raise UsageError(f"--table {folder}: there is no such folder; name the one that --out named")
    found = {file.stem.removeprefix("bench-"): _read(file) for file in sorted(folder.glob("bench-*.json"))}
    names = [*shapes, *(name for name, one in found.items() if name not in shapes and "goals" in one)]
    check = _read(folder / _CHECK) if (folder / _CHECK).exists() else None
    return "\n\n".join([*(_section(name, found.get(name)) for name in names), _check(check)])


def _read(file: Path) -> JsonDict:
    try:
        found: JsonDict = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a result ({error}); remove it, or measure it again") from error
    return found


def _section(name: str, found: JsonDict | None) -> str:
    if found is None:
        return f"**{name}**: {NOT_TAKEN}."
    shape, gpu = found["shape"], found["gpu"]
    lines = [
        f"**{name}** — {shape['described']}; {gpu.get('name', 'GPU unknown')}, torch {gpu.get('torch', '?')}, "
        f"{found['created'][:10]}, commit {found['commit'] or 'unknown'}",
        "",
        *_systems_table(found["systems"]),
        "",
        *_ladder_table(found["systems"]),
        "",
        *_speed_ups_table(found["derived"]["speed_up"]),
        "",
        *_goals_table(found["goals"]),
    ]
    if found["left_out"]:
        lines += ["", f"No time was left for: {', '.join(found['left_out'])}."]
    return "\n".join(lines)


def _systems_table(systems: Mapping[str, JsonDict]) -> Iterator[str]:
    yield "| system | tokens/s, median [min, max] | TPOT ms | TPOT over resident | bytes/token | hits | prefill ms " \
          "| peak GPU | peak host | tokens equal |"  # fmt: skip
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, one in systems.items():
        yield f"| {' | '.join([name, *_cells(one)])} |"


def _cells(one: JsonDict) -> list[str]:
    if "tokens_per_s" not in one:
        return [f"{NOT_TAKEN}: {one.get('error', 'nothing was measured')}", *[""] * 8]
    rate, over, memory = one["tokens_per_s"], one.get("tpot_over_resident"), one.get("memory")
    hits, moved, prefill = one.get("hit_rate"), one.get("bytes_per_token"), one.get("prefill")
    return [
        f"{rate['median']:.2f} [{rate['min']:.2f}, {rate['max']:.2f}]" + (" (then failed)" if "error" in one else ""),
        f"{one['tpot_ms']:.2f}",
        "" if over is None else _ratio(over),
        "" if moved is None else format_bytes(moved),
        "" if hits is None else f"{hits:.1%}",
        "" if prefill is None else f"{1e3 * prefill['seconds']:.1f}",
        "" if memory is None else format_bytes(memory["peak_gpu_bytes"]),
        "" if memory is None else format_bytes(memory["peak_host_bytes"]),
        f"{one['equal_tokens']} of {one['compared_tokens']}" if "equal_tokens" in one else "",
    ]


def _ladder_table(systems: Mapping[str, JsonDict]) -> Iterator[str]:
    yield "| tokens/s | bound, oracle's loads | bound, own loads | attainable | measured | fraction of attainable |"
    yield "|---|---|---|---|---|---|"
    for name, one in systems.items():
        if steps := one.get("ladder"):
            rates = (steps[key] for key in ("bound_oracle", "bound_own", "attainable", "measured"))
            cells = [NOT_TAKEN if rate is None else f"{rate:.2f}" for rate in rates]
            warning = f" {steps['flag']}" if steps["flag"] else ""
            yield f"| {' | '.join([name, *cells, _ratio(steps['fraction']) + warning])} |"


def _speed_ups_table(speed_ups: Mapping[str, JsonDict]) -> Iterator[str]:
    yield f"| {USUAL} over | tokens/s, times ({RATIO_HOW}) | pairs |"
    yield "|---|---|---|"
    for name, over in speed_ups.items():
        yield f"| {name} | {_ratio(over)} | {over['num_pairs']} |"


def _goals_table(goals: Iterable[JsonDict]) -> Iterator[str]:
    yield "| goal | wanted | measured | |"
    yield "|---|---|---|---|"
    for one in goals:
        value = "" if one["value"] is None else f"{one['value']:.4g}"
        note = f"; {one['note']}" if one["note"] else ""
        yield f"| {one['goal']} | {one['wanted']} | {value} | {one['status']}{note} |"


def _check(found: JsonDict | None) -> str:
    if found is None:
        return f"**gpu-check**: {NOT_TAKEN}."
    steps = (f"{one['name']} {one['status']}" for one in found["steps"])
    return f"**gpu-check** ({found['created'][:10]}, commit {found['commit'] or 'unknown'}): {', '.join(steps)}."


def _ratio(found: JsonDict) -> str:
    return f"{found['estimate']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
