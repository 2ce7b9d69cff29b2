"""YAML without its traps: duplicate keys are refused, and only what looks like a number is one.

PyYAML reads YAML 1.1, where `no` is false, `1:30` is 90, `010` is 8, `2026-11-22` is a date and `1e3` is text. Here
plain scalars are read by the core schema of YAML 1.2, less its octal, hexadecimal, infinite and not-a-number numbers.
Aliases and tags are refused: a page of the former unfolds to gigabytes, and nothing here needs either.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from decimal import Decimal
from typing import Any

import yaml

_CORE_SCHEMA = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)


_MOST_CHARACTERS = 1 << 18  # profiles have a few thousand; PyYAML takes seconds for this many
_PLACE = re.compile(' in "<(?:byte|unicode) string>", ')  # PyYAML's names for what is no file
_UNFIT = re.compile("[\0\ud800-\udfff]")


def _refused(what: str, advice: str, place: Any) -> yaml.YAMLError:
    return yaml.YAMLError(f"{what} in line {place.start_mark.line + 1}: {advice}")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- replaces PyYAML's own table

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"alias *{event.anchor}", "write its value out", event)
        if event.tag is not None:
            raise _refused(f"tag {event.tag}", "leave it out", event)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text: str = super().construct_scalar(node)
        if unfit := _UNFIT.search(text):
            raise _refused(f"character {unfit[0]!a}", "neither a name nor a path can hold it", node)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.YAMLError(f"duplicate key {key!r} in line {line}, first in line {seen[key]}")
                seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[-+.\d]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_float(dumper: _Dumper, number: float) -> yaml.ScalarNode:
    plain = format(Decimal(repr(number)), "f")
    if len(plain) > 24:
        return yaml.SafeDumper.represent_float(dumper, number)
    return dumper.represent_scalar("tag:yaml.org,2002:float", plain if "." in plain else plain + ".0")


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(float, _represent_float)


def parse(source: bytes | str) -> Any:
    """Content of one YAML document; None when it is empty.

    Raises:
        ValueError: one line that says what is wrong, with its line number.
    """
    if len(source) > _MOST_CHARACTERS:
        raise ValueError(f"not read: {len(source)} characters; a profile has at most {_MOST_CHARACTERS}")
    try:
        return yaml.load(source, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        said = _PLACE.sub(" in ", " ".join(str(error).split()))
        raise ValueError(f"not valid YAML: {said}") from error
    except RecursionError as error:
        raise ValueError("not valid YAML: nested too deeply") from error


def dump(tree: dict[str, Any]) -> str:
    """YAML of plain values that every YAML reader, of either version, reads alike; keys stay in their order."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=float("inf"), default_flow_style=False))
