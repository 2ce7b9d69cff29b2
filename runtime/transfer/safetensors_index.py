"""Where every tensor of a safetensors file lies: the header, read and checked without touching a weight.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without holes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MOST_DIMENSIONS = 64  # of a tensor in torch
_WAY_OUT = "download it again"


class TensorEntry(NamedTuple):
    """A tensor at rest: `num_bytes` bytes from byte `offset` of `file`. `dtype` is None for one not listed above."""

    name: str
    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_index(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of all `files` by name; of a name that occurs twice the later one, as transformers has it.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt; the message names the file and the tensor.
    """
    return {entry.name: entry for file in files for entry in read_header(file)}


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one file in the order of their bytes. Raises CheckpointError as `read_index` does."""
    try:
        with file.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            header, data_start = _parse(file, stream.read(_LENGTH_BYTES), stream, file_bytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); {_WAY_OUT}") from error
    entries = [_entry(file, name, fields, data_start) for name, fields in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_contiguous(file, entries, data_start, file_bytes)
    return entries


def _parse(file: Path, length: bytes, stream: Any, file_bytes: int) -> tuple[dict[str, Any], int]:
    header_bytes = int.from_bytes(length, "little")
    room_bytes = file_bytes - _LENGTH_BYTES
    if len(length) < _LENGTH_BYTES or not 2 <= header_bytes <= min(room_bytes, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file}: not a safetensors file, or truncated: its header would be {header_bytes} bytes long, "
            f"and the file has {file_bytes}; {_WAY_OUT}"
        )
    try:
        header = json.loads(stream.read(header_bytes))
    except ValueError as error:
        raise CheckpointError(f"{file}: the safetensors header is not JSON ({error}); {_WAY_OUT}") from error
    except RecursionError:
        raise CheckpointError(f"{file}: the safetensors header is nested too deeply; {_WAY_OUT}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not a JSON object; {_WAY_OUT}")
    return header, _LENGTH_BYTES + header_bytes


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        begin, end = fields["data_offsets"]
        shape = tuple(fields["shape"])
        dtype = DTYPES.get(fields["dtype"])
        if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
            raise TypeError("a size or an offset is not a whole number of 63 bits")
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{len(shape)} dimensions")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the header's entry of tensor {name!r} is corrupt ({error}); {_WAY_OUT}"
        ) from error
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(shape)} and dtype {fields['dtype']} has {end - begin} bytes "
            f"instead of {math.prod(shape) * dtype.itemsize}; {_WAY_OUT}"
        )
    return TensorEntry(name, file, dtype, shape, data_start + begin, end - begin)


def _check_contiguous(file: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position or entry.num_bytes < 0:
            raise CheckpointError(
                f"{file}: tensor {entry.name!r} begins at byte {entry.offset} and the one before it ends at "
                f"{position}: the header is corrupt; {_WAY_OUT}"
            )
        position += entry.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"{file}: truncated: tensor {entry.name!r} ends at byte {position}, the file at {file_bytes}; "
                f"{_WAY_OUT}"
            )
    if position != file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - position} bytes belong to no tensor: corrupt; {_WAY_OUT}")
