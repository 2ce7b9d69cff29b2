"""Headers: what is read of sound files, and how broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runtime.errors import CheckpointError
from runtime.transfer.safetensors_index import read_header

TENSORS = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.arange(4, dtype=torch.float32)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path


def rewrite(file: Path, header: Any) -> None:
    """Replace the header by `header` as JSON (bytes as they are) and leave the tensors' bytes."""
    data = file.read_bytes()
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + int.from_bytes(data[:8], "little") :])


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_entries_are_where_the_bytes_are(file: Path) -> None:
    data = file.read_bytes()
    for entry in read_header(file):
        wanted = TENSORS[entry.name]
        found = torch.frombuffer(bytearray(data), dtype=entry.dtype, offset=entry.offset, count=wanted.numel())
        assert torch.equal(found.view(entry.shape), wanted)
        assert entry.num_bytes == found.nbytes


def test_dtype_that_torch_lacks_is_left_unnamed(file: Path) -> None:
    header = header_of(file)
    header["b"]["dtype"] = "F4"
    rewrite(file, header)
    assert {entry.name: entry.dtype for entry in read_header(file)} == {"a": torch.bfloat16, "b": None}


@pytest.mark.parametrize(("cut_bytes", "which"), [(1, -1), (12, -1), (13, 0), (28, 0)])
def test_truncated_file_names_the_first_tensor_that_is_cut(file: Path, cut_bytes: int, which: int) -> None:
    last = read_header(file)[which]
    file.write_bytes(file.read_bytes()[:-cut_bytes])
    with pytest.raises(CheckpointError, match=f"truncated: tensor '{last.name}' ends at byte .*download it again"):
        read_header(file)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 40, b"\x01" + bytes(30), b"version https://git-lfs..."])
def test_what_is_no_safetensors_file(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file, or truncated"):
        read_header(file)


@pytest.mark.parametrize("header", [b"{not json}", b"[1, 2]", b"\xff\xfe{}"])
def test_header_that_is_no_object(file: Path, header: bytes) -> None:
    rewrite(file, header)
    with pytest.raises(CheckpointError, match="the safetensors header is not"):
        read_header(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [2, 4]}, "tensor 'b' of shape .* has 16 bytes instead of 32"),
        ({"data_offsets": [4, 20]}, "begins at byte .* the header is corrupt"),
        ({"data_offsets": [16, 0]}, "tensor 'b' .* has -16 bytes"),
        ({"data_offsets": [0]}, "entry of tensor 'b' is corrupt"),
        ({"data_offsets": None}, "entry of tensor 'b' is corrupt"),
        ({"shape": ["x"]}, "entry of tensor 'b' is corrupt"),
        ({"shape": [-4]}, "entry of tensor 'b' is corrupt"),
        ({"dtype": ["F32"]}, "entry of tensor 'b' is corrupt"),
    ],
)
def test_corrupt_entry_is_named(file: Path, fields: dict[str, Any], message: str) -> None:
    header = header_of(file)
    header["b"] |= fields
    rewrite(file, header)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}.*download it again"):
        read_header(file)


def test_bytes_that_belong_to_no_tensor(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"surplus")
    with pytest.raises(CheckpointError, match="7 bytes belong to no tensor"):
        read_header(file)
