"""Pieces of the schema: how a value is checked, and what its user reads where it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

from runtime.errors import UsageError
from runtime.machine import parse_bytes


class Section(BaseModel):
    """A mapping of the file: no other keys, no conversions, no change afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class OneOf:
    """A name of something that exists."""

    noun: str
    known: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.known)}

    def _check(self, name: str) -> str:
        if name not in self.known:
            raise ValueError(f"unknown {self.noun} {name!r}; known: {', '.join(self.known)}")
        return name


def check_slots(value: object) -> object:
    """Of `cache.slots`, before its type is."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value) and 0 < float(value[:-1]) <= 100:
        return value
    raise ValueError(f'{value!r} is neither a count of at least 1 nor a share of all experts such as "25%"')


def _read_bytes(value: object) -> object:
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from error


_SLOTS: Mapping[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}, {"type": "null"}]
}
_BYTES: Mapping[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[A-Za-z]*\s*$"}]
}

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]
"""With a million of them the system kills the process instead of refusing."""
ByteCount = Annotated[int, BeforeValidator(_read_bytes), Field(ge=1), WithJsonSchema(dict(_BYTES))]
Slots = Annotated[int | str | None, BeforeValidator(check_slots), WithJsonSchema(dict(_SLOTS))]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Params = dict[str, bool | int | float | str]


def refuse_params(noun: str, name: str, params: Params) -> None:
    """For what has none."""
    if params:
        raise ValueError(f"{noun} {name!r} takes no params; remove {', '.join(params)}")
