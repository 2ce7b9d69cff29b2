"""Profiles that there are: `python -m runtime.profile explain [--model M] [PROFILE…]`, `lint FILE…`, `schema`.

explain: every profile in the order in which they are looked up, how it fits, which one is taken, and why the others are
not. lint: what is wrong with files that others are to trust; exit code 2 where something is. schema: the JSON schema.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.device_options import add_device_options, named_device
from runtime.errors import cli_main
from runtime.machine import format_bytes
from runtime.profile.evidence import ModelIdentity
from runtime.profile.lint import lint
from runtime.profile.lookup import NAMED, Candidate, Judged, candidate, candidates, find_profile, judge, places
from runtime.profile.matching import MachineFacts, machine_facts
from runtime.profile.schema import Profile


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.profile", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="which profile is taken, and why no other")
    explain.add_argument("profiles", nargs="*", metavar="PROFILE", help="path or name; default: all that are found")
    explain.add_argument("--model", help="checkpoint folder or hub id; default: each profile's own")
    add_device_options(explain, "default: the GPU that a named profile was tuned on, else the CPU")
    lints = commands.add_parser("lint", help="what is wrong with profiles that others are to trust")
    lints.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for command in (explain, lints):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("schema", help="print the JSON schema")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    commands = {"explain": _explain, "lint": _lint, "schema": _schema}
    return cli_main(lambda: commands[options.command](options))


def json_schema() -> dict[str, Any]:
    """Of a profile's file, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Profile.model_json_schema()}


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0


def _lint(options: argparse.Namespace) -> int:
    found = {str(file): lint(file) for file in options.files}
    if options.json:
        print(json.dumps({file: [asdict(problem) for problem in problems] for file, problems in found.items()}))
    else:
        for file, problems in found.items():
            print("\n".join(f"{file}: {one.severity}: {one.message}" for one in problems) or f"{file}: sound")
    return 2 if any(one.severity == "error" for problems in found.values() for one in problems) else 0


def _explain(options: argparse.Namespace) -> int:
    found = [candidate(find_profile(name)) for name in options.profiles] or list(candidates())
    device = named_device(options)
    machines = [_facts(device, one) for one in found]
    judged = _judged(found, machines, None if options.model is None else _identity(options.model))
    if options.json:
        print(json.dumps({"model": options.model, "profiles": [_as_dict(one) for one in judged]}))
        return 0
    for kind, total_bytes in {here.device: here.memory_total_bytes for here in machines or [_facts(device)]}.items():
        print(f"for {kind} with {format_bytes(total_bytes)} of memory")
    for number, place in enumerate(places(), start=1):
        print(f"{number}. {place.name:<20} {place.folder}{'' if place.folder.is_dir() else ' (is not there)'}")
    for one in judged:
        print(f"\n{one.candidate.path}  [{one.candidate.place.name}]")
        if one.match is not None:
            print(f"  {one.match.level}: {'; '.join(one.match.reasons) or 'model and machine are those it is for'}")
        taken = "taken" if options.model is not None else "taken for the model that it names"
        print(f"  {taken}" if one.is_used else f"  not taken: {one.why}")
    if not any(one.is_used for one in judged):
        print("\nnone is taken: the default configuration runs; tune one: python -m harness.tune --model MODEL")
    return 0


def _facts(device: str | None, one: Candidate | None = None) -> MachineFacts:
    """Of the device that is named, else the one that the profile runs on, as `runtime.load` chooses it."""
    profile = Profile.default() if one is None or one.profile is None else one.profile
    if device is None and not (one is not None and one.place == NAMED and profile.gpu is not None):
        return machine_facts()
    from runtime.devices import device_facts, find_device  # torch: only where there may be a GPU

    return device_facts(find_device(device, profile))


def _judged(found: Sequence[Candidate], machines: Sequence[MachineFacts], model: ModelIdentity | None) -> list[Judged]:
    """For one model, or each profile among those for its own; on the machine of each."""
    now = datetime.now(UTC)
    judged: dict[int, Judged] = {}
    matches = [None if one.profile is None else one.profile.match for one in found]
    own = [model or (None if match is None else match.model) for match in matches]
    groups = [(identity, here.device) for identity, here in zip(own, machines, strict=True)]
    for group in dict.fromkeys(groups):
        numbers = [number for number, other in enumerate(groups) if other == group]
        results = judge([found[number] for number in numbers], group[0] or _NO_MODEL, machines[numbers[0]], now)
        judged.update(zip(numbers, results, strict=True))
    return [judged[number] for number in range(len(found))]


_NO_MODEL = ModelIdentity(architecture="", layers=1, experts=1, top_k=1, expert_bytes=1, dtype="")
"""Of profiles that name none: it is never compared."""


def _identity(model: str) -> ModelIdentity:
    from runtime.facts import describe  # torch: only where a checkpoint is named

    return describe(model).identity


def _as_dict(one: Judged) -> dict[str, Any]:
    profile, match = one.candidate.profile, one.match
    return {
        "place": one.candidate.place.name,
        "path": str(one.candidate.path),
        "id": None if profile is None else profile.id,
        "level": None if match is None else match.level,
        "reasons": [] if match is None else list(match.reasons),
        "is_used": one.is_used,
        "why_not": one.why or None,
    }


if __name__ == "__main__":
    sys.exit(main())
