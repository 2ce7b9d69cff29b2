"""What the fuzzer found, and the tricks that each format is known for: one line, in little time and memory."""

from __future__ import annotations

import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import readers
from readers import READERS, SHAPE, mangled
from tiny import save_tiny

from harness import simulate
from runtime import generate, machine
from runtime.errors import (
    ArtifactError,
    CheckpointError,
    ExpertFlowError,
    ProfileError,
    PromptError,
    TraceError,
    one_line,
)
from runtime.predictors.artifact import Artifact, read_artifact, write_artifact
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.profile import load_profile
from runtime.prompts import read_prompts
from runtime.strict_yaml import parse
from runtime.trace import read_trace
from runtime.transfer.safetensors_index import read_header

HEAD = "schema_version: 1\nkind: moe-offload-profile\n"


def _laughs(depth: int) -> str:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'lol'}]" for n in range(depth)]
    return "\n".join(rows) + f"\nfixed: *a{depth - 1}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_laughs(30), "alias *a0 in line 2: write its value out"),
        ("fixed: &a [*a]", "alias *a"),
        ("cache: !!python/object/apply:os.system ['true']", "tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("cache: {!!merge <<: {slots: 1}}", "tag"),
        ("provenance: {created: !!timestamp x}", "tag"),
        ("cache: {slots: !!int ''}", "tag"),
        ("prefetch: {adaptive: !!bool maybe}", "tag"),
        ("fixed: " + "[" * 20_000, "nested too deeply"),
        ("provenance: {model: " + "x" * 300_000 + "}", "a profile has at most 262144"),
        ('provenance: {model: "a\\0b"}', "neither a name nor a path"),
        ('provenance: {model: "\\ud800"}', "neither a name nor a path"),
        ("limits: {max_memory_bytes: " + "9" * 5000 + "}", "not valid YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml(text: str, expected: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError) as refused:
        parse(text)
    assert expected in str(refused.value) and time.process_time() - start < 5


def test_a_profile_with_thousands_of_mistakes_is_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + "".join(f"cach{n}: 1\n" for n in range(2000)))
    with pytest.raises(ProfileError) as refused:
        load_profile(tmp_path / "p.yaml")
    assert "'cach0'" in one_line(refused.value) and len(one_line(refused.value)) < 2100


def _npz(path: Path, **changes: Any) -> Path:
    good = {"experts": np.zeros((2, 3, 1), np.uint16), "request": np.zeros(2, np.int32), "meta": '{"num_experts": 8}'}
    np.savez(path, **{**good, **changes})
    return path


def _header(shape: str, descr: str = "'<u2'", body: bytes = b"\0" * 12) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + body


def _with_member(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    """A trace whose `experts` is `content`."""
    _npz(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, old in members.items():
            archive.writestr(name, content if name == "experts.npy" else old)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_header("(4611686018427387904, 3, 1)"), "12"),
        (_header("(2147483647, 3, 1)"), "12"),
        (_header("(-2, 3, 1)"), "damaged"),
        (_header("(0, 0, 0)"), "damaged"),
        (_header("(1,) * 10**9"), "header is damaged"),
        (_header("('a',)"), "header is damaged"),
        (_header("(" * 4000), "header is damaged"),
        (_header("(2, 3, 1)", "'<U500000000'"), "damaged"),
        (_header("(2, 3, 1)", "[('a', '|O')]"), "Python objects"),
        (_header("(1,)", "'|O'", b"cos\nsystem\n(S'true'\ntR."), "Python objects"),
        (b"", "header is damaged"),
    ],
    ids=range(11),
)
def test_an_array_that_is_not_what_it_says(
    tmp_path: Path, content: bytes, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle, "load", lambda *a, **o: pytest.fail("unpickled"))
    with pytest.raises(TraceError) as refused:
        read_trace(_with_member(tmp_path / "t.npz", content))
    assert expected in str(refused.value) and "experts" in str(refused.value)


def _peak_of(act: Callable[[], object]) -> int:
    if not machine.reset_peak():
        pytest.skip("the kernel keeps no peak that can be reset")
    before = machine.resident_bytes()
    act()
    return machine.peak_resident_bytes() - before


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    with zipfile.ZipFile(_npz(tmp_path / "t.npz")) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "t.npz").write_bytes(mutate.bomb(members))
    assert (tmp_path / "t.npz").stat().st_size < 2 << 20

    def read() -> None:
        with pytest.raises(TraceError, match="would unpack to"):
            read_trace(tmp_path / "t.npz")

    assert _peak_of(read) < 64 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_zipfile_unpacks_at_once(tmp_path: Path, method: int) -> None:
    """A block of bzip2 of some bytes may be gigabytes, whatever size the archive states."""
    with pytest.raises(TraceError, match="a method that numpy does not use"):
        read_trace(_with_member(tmp_path / "t.npz", _header("(2, 3, 1)"), method))


def test_members_that_are_there_twice_or_elsewhere(tmp_path: Path) -> None:
    with zipfile.ZipFile(_npz(tmp_path / "t.npz"), "a") as archive:
        archive.writestr("../../escape.npy", b"x")
    assert read_trace(tmp_path / "t.npz").num_tokens == 2 and not list(tmp_path.parent.glob("escape*"))
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "t.npz", "a") as archive:
        archive.writestr("experts.npy", b"x")
    with pytest.raises(TraceError, match="experts is in it twice"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"num_experts": 8, "expert_bytes": "abc"}, "expert_bytes is 'abc'"),
        ({"num_experts": 8, "expert_bytes": 10**30}, "expert_bytes"),
        ({"num_experts": 8, "tasks": {"a": 1}}, "tasks is {'a': 1}"),
    ],
)
def test_meta_that_others_would_stumble_over(tmp_path: Path, meta: dict[str, Any], expected: str) -> None:
    with pytest.raises(TraceError, match="meta: ") as refused:
        read_trace(_npz(tmp_path / "t.npz", meta=json.dumps(meta)))
    assert expected in str(refused.value)


def test_meta_nested_too_deeply_and_experts_beyond_any_model(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nested too deeply"):
        read_trace(_npz(tmp_path / "t.npz", meta="[" * 20_000))
    wide = {"experts": np.zeros((1, 60_000, 1), np.uint16), "request": np.zeros(1), "meta": '{"num_experts": 60000}'}
    with pytest.raises(TraceError, match="60000 layers of 60000 experts"):
        read_trace(_npz(tmp_path / "t.npz", **{**wide, "request": np.zeros(1, np.int32)}))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "\\ud800"}', "no character"),
        ('{"prompt": "a", "id": "\\udfff"}', "no character"),
        ('{"prompt": "a", "slo_ms": ' + "9" * 4000 + "}", "not a number above 0"),
        ('{"prompt": "a", "max_new_tokens": 1e300}', "not a number above 0"),
        ('{"prompt": "a", "slo_ms": 5e-324}', "not a number above 0"),
        ('{"prompt": ' + "[" * 20_000, "nested too deeply"),
    ],
    ids=range(6),
)
def test_prompts(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(PromptError, match=expected):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_with_a_byte_order_mark_and_line_separators_within_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8-sig")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b\x85c"]


def _safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"[" * 20_000, "nested too deeply"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 0]}}', "63 bits"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9, " * 999 + b'9], "data_offsets": [0, 4]}}', "1000 dimensions"),
        (b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', "instead of"),
    ],
    ids=range(4),
)
def test_checkpoint_headers(tmp_path: Path, header: bytes, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read_header(_safetensors(tmp_path / "m.safetensors", header))


def _artifacts() -> dict[str, Artifact]:
    return {artifact.kind: artifact for artifact in readers._artifacts()}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("routing_path", {"hidden": 0}),
        ("routing_path", {"feed_forward": [8]}),
        ("routing_path", {"encoder_layers": 60_000}),
        ("routing_path", {"feed_forward": 60_000}),
        ("routing_path", {"window": 15}),
        ("periodic", {"window": 10**12}),
        ("periodic", {"hidden": 2**31}),
    ],
)
def test_networks_are_not_built_on_the_word_of_their_sizes(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    good = _artifacts()[kind]
    params = {**good.params, "sizes": {**good.params["sizes"], **change}}
    write_artifact(tmp_path / "a.safetensors", Artifact(kind, "m", SHAPE, params, good.arrays))

    def read() -> None:
        with pytest.raises(ArtifactError, match="is damaged"):
            make_predictor(PredictorSpec(kind, tmp_path / "a.safetensors"), SHAPE)

    assert _peak_of(read) < 64 << 20


@pytest.mark.parametrize("layer", [float("inf"), 3, "a", None])
def test_layers_that_are_none(tmp_path: Path, layer: object) -> None:
    good = _artifacts()["periodic"]
    params = {**good.params, "sensitivity": {"a": {"insensitive_layers": [layer]}}}
    write_artifact(tmp_path / "a.safetensors", Artifact("periodic", "m", SHAPE, params, good.arrays))
    with pytest.raises(ArtifactError, match="is damaged"):
        make_predictor(PredictorSpec("periodic", tmp_path / "a.safetensors"), SHAPE)


@pytest.mark.parametrize("kind", ["routing_path", "periodic"])
def test_weights_that_are_no_numbers(tmp_path: Path, kind: str) -> None:
    good = _artifacts()[kind]
    name = next(name for name, array in good.arrays.items() if array.dtype.kind == "f")
    arrays = {**good.arrays, name: np.full_like(good.arrays[name], np.nan)}
    write_artifact(tmp_path / "a.safetensors", Artifact(kind, "m", SHAPE, good.params, arrays))
    with pytest.raises(ArtifactError, match="not finite"):
        make_predictor(PredictorSpec(kind, tmp_path / "a.safetensors"), SHAPE)


@pytest.mark.parametrize(
    "about",
    ["[" * 20_000, '{"kind": [], "model": "m", "shape": {"layers": 3, "experts": 8, "top_k": 2}, "params": {}}'],
    ids=["deep", "kind"],
)
def test_a_description_that_is_none(tmp_path: Path, about: str) -> None:
    metadata = {"format": "expertflow-predictor", "version": "1", "about": about}
    _safetensors(tmp_path / "a.safetensors", json.dumps({"__metadata__": metadata}).encode())
    with pytest.raises(ArtifactError, match="description is damaged"):
        read_artifact(tmp_path / "a.safetensors", shape=SHAPE)


def test_an_error_is_one_line_for_a_terminal() -> None:
    assert one_line(ExpertFlowError("a\n\x1b[2J\u202e b" + "c" * 9000)).startswith("a \\x1b[2J\\u202e bccc")
    assert len(one_line(ExpertFlowError("c" * 9000))) < 2100


# --- the same through the commands ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _samples(name: str, folder: Path, count: int) -> list[Path]:
    """Mangled files, most of which are refused."""
    reader, paths = READERS[name], []
    seeds = reader.seeds(folder)
    for number in range(count):
        paths.append(folder / f"{number}{reader.suffix}")
        paths[-1].write_bytes(mangled(reader, seeds, random.Random(f"command/{name}/{number}")))
    return paths


def _run(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Exit code of a command; a refusal is one line and nothing else."""
    code = main(arguments)
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert code in (0, 2) and len(errors) == (code == 2) and "Traceback" not in said.err, (arguments, said.err)
    return code


def test_mangled_traces_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policy", "lru", "--slots", "50%", "--json", "--trace"]
    codes = [_run(simulate.main, [*options, str(path)], capsys) for path in _samples("trace", tmp_path, 60)]
    assert codes.count(2) > 20 and codes.count(0) > 0


def test_mangled_profiles_through_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "a", "--max-new-tokens", "1", "--model", str(checkpoint), "--profile"]
    codes = [_run(generate.main, [*options, str(path)], capsys) for path in _samples("profile", tmp_path, 30)]
    assert codes.count(2) > 15


def test_mangled_prompts_through_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "1", "--model", str(checkpoint), "--prompts"]
    codes = [_run(generate.main, [*options, str(path)], capsys) for path in _samples("prompts", tmp_path, 8)]
    assert codes.count(2) > 2
