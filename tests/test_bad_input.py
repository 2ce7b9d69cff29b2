"""What a user can get wrong: one line with the way out, exit 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

import runtime
from runtime import build_tiers
from runtime.errors import ProfileError, UsageError
from runtime.facts import describe
from runtime.files import check_writable
from runtime.generate import main
from runtime.profile import Profile, save_profile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command is refused with."""
    assert main(["--prompt", "hello", "--max-new-tokens", "4", *arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    assert captured.err.strip().splitlines()[-1] == lines[0]
    return lines[0]


def test_a_path_that_is_not_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has no config.json" in _refused(capsys, "--model", str(tmp_path))
    assert "neither a folder nor a model" in _refused(capsys, "--model", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a valid JSON file; copy"),
        ("{}", "Unrecognized model"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', "'hidden_size' expected int, got str"),
    ],
)
def test_a_config_that_is_none(copy: Path, capsys: pytest.CaptureFixture[str], content: str, says: str) -> None:
    (copy / "config.json").write_text(content)
    said = _refused(capsys, "--model", str(copy))
    assert says in said and "; copy the one that came with the checkpoint again" in said


@pytest.mark.parametrize("source", [None, 3, "", {"kind": "moe-offload-profile"}])
def test_what_names_nothing_to_load(source: Any) -> None:
    with pytest.raises(ProfileError, match="names nothing to load; give a profile"):
        runtime.load(source)


def test_a_file_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    """Also where permissions allow it and the file system does not, as root meets it."""
    for path in (Path("/proc/nowhere/t.npz"), Path("/proc/t.npz"), tmp_path, tmp_path / ("n" * 300) / "t.npz"):
        with pytest.raises(UsageError, match=r"--out .*: cannot be written \(.+\); name a file in a folder that can"):
            check_writable("--out", path)
    check_writable("--out", tmp_path / "new" / "t.npz")
    check_writable("--out", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("bench", []),
        ("batching", ["equality"]),
        ("demo", ["--expert-bytes", "1MiB"]),
        ("fit", ["sequence", "--trace", str(Path(__file__).parent / "data" / "demo-routing.npz")]),
    ],
)
def test_a_command_refuses_what_it_cannot_write_before_it_works(command: str, arguments: list[str]) -> None:
    words = [sys.executable, "-m", f"harness.{command}", *arguments, "--out", "/proc/x.safetensors"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written (No such file or directory); name a file in a folder that can" in done.stderr


def test_a_prompt_longer_than_the_context(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one of --prompts: what is beyond the positions that the model knows means nothing."""
    said = _refused(capsys, "--model", str(checkpoint), "--max-new-tokens", "1000000")
    assert "and 1000000 new ones, more than the" in said and "of the model's context; shorten it" in said


def test_a_hub_id_that_cannot_be_had_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("runtime.model.AutoConfig.from_pretrained", refuse)
    assert "its cache has: You are trying to access a gated repo.; check" in _refused(capsys, "--model", "some/model")


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    assert "llama is a dense model" in _refused(capsys, "--model", str(tmp_path))


def test_a_quantised_model_names_the_method(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "is quantised (mxfp4)" in _refused(capsys, "--model", str(copy))


def test_a_budget_below_one_expert(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(capsys, "--model", str(checkpoint), "--set", "limits.max_memory_bytes=1MiB")
    assert "no room for one expert" in said and "the smallest that works" in said


def test_a_budget_that_comes_from_a_profile_names_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = describe(checkpoint).identity.model_dump()
    known = {"match.model": identity, "match.device": "cpu", "limits.max_memory_bytes": 1 << 20}
    save_profile(Profile.default().with_overrides(known), tmp_path / "found.yaml")
    monkeypatch.setenv("EXPERTFLOW_PROFILES", str(tmp_path))
    said = _refused(capsys, "--model", str(checkpoint))
    assert "no room for one expert" in said and f"profile {tmp_path / 'found.yaml'} is used" in said


def test_a_missing_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks the shard model-00001-of-00002.safetensors" in _refused(capsys, "--model", str(copy))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _scribble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)


def _shift(file: Path) -> None:
    """Make the first tensor longer than it is."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"][0] += 1
    new = json.dumps(header).encode().ljust(length)
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


@pytest.mark.parametrize(("damage", "names_tensor"), [(_truncate, True), (_scribble, False), (_shift, True)])
def test_a_damaged_file_is_named_and_its_tensor(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], names_tensor: bool
) -> None:
    damage(copy / "model.safetensors")
    said = _refused(capsys, "--model", str(copy))
    assert "model.safetensors" in said and "download it again" in said
    assert ("model.layers" in said or "embed_tokens" in said or "lm_head" in said) == names_tensor


def test_a_read_that_fails_in_the_middle_of_generation(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def fail_later(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(build_tiers, "DiskTransfer", partial(build_tiers.DiskTransfer, read=fail_later))
    said = _refused(capsys, "--model", str(checkpoint), "--set", "cache.slots=2", "--set", "transfer.io_threads=1")
    assert "Input/output error" in said and "model.safetensors" in said and "MoE layer" in said


def test_a_profile_made_for_another_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny(tmp_path / "other", experts=4)
    identity = describe(checkpoint).identity.model_dump()
    profile = Profile.default().with_overrides({"match.model": identity, "match.device": "cpu"})
    save_profile(profile, tmp_path / "p.yaml")
    said = _refused(capsys, "--profile", str(tmp_path / "p.yaml"), "--model", str(other), "--strict")
    assert "another model" in said and "experts: profile 8, here 4" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schema_version: 1\nkind: moe-offload-profile\ncach: {slots: 3}\n", "'cache'"),
        ("schema_version: 1\nkind: moe-offload-profile\nkind: x\n", "line 3"),
        ("schema_version: 9\nkind: moe-offload-profile\n", "upgrade"),
    ],
    ids=["unknown key", "duplicate key", "newer schema"],
)
def test_a_profile_with_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    assert expected in _refused(capsys, "--profile", str(tmp_path / "p.yaml"))


def test_nothing_to_run_and_an_unwritable_setting(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert "--profile FILE" in _refused(capsys)
    said = _refused(capsys, "--model", str(checkpoint), "--set", "cache.policy=fifo")
    assert "unknown policy 'fifo'" in said and "next_use" in said
