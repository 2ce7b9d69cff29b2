"""What a predictor learned outlives the engine: first start, save, warm restart, with one profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime.errors import ArtifactError, UsageError
from runtime.generate import main
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact
from runtime.profile import Profile, save_profile

SHAPE = RoutingShape(LAYERS, EXPERTS, TOP_K)
KEYS = {
    "cache.slots": 6,
    "cache.policy": "activation",
    "prefetch.on_trial": False,
    "predictor.kind": "activation_matrix",
    "predictor.artifact": "learned/eam.safetensors",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def profile(checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    save_profile(Profile.default().with_overrides({**KEYS, "provenance.model": str(checkpoint)}), path)
    return path


def _saved(profile: Path) -> Artifact:
    path = profile.with_name("learned") / "eam.safetensors"
    return read_artifact(path, kind="activation_matrix", shape=SHAPE, model=None)


def _generate(engine: runtime.Engine, prompt: str) -> None:
    inputs = engine.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    engine.model.generate(**inputs, max_new_tokens=6, do_sample=False)


def test_the_first_start_is_cold_and_the_next_one_warm(profile: Path, checkpoint: Path) -> None:
    with runtime.load(profile) as engine:
        assert any("eam.safetensors is not there yet" in note for note in engine.notes)
        _generate(engine, "the cat")
        _generate(engine, "a dog.")
        assert engine.stats().cache.num_prefetch_issued == 0  # no request before these has ended
        assert engine.save_predictor() == profile.with_name("learned") / "eam.safetensors"
    saved = _saved(profile)
    assert saved.model == checkpoint.name
    assert saved.arrays["prefill_tokens"].tolist() == [7, 6]
    assert saved.arrays["decode_tokens"].tolist() == [5, 5]
    assert (saved.arrays["decode"].sum(axis=2) == 5 * TOP_K).all()
    with runtime.load(profile) as engine:
        assert not engine.notes
        engine.save_predictor()
        again = _saved(profile)
        assert all(np.array_equal(again.arrays[name], array) for name, array in saved.arrays.items())
        _generate(engine, "so it goes")
        assert engine.stats().cache.num_prefetch_issued > 0
        engine.check_integrity()


def test_the_command_line_saves_where_the_profile_or_the_user_says(profile: Path, tmp_path: Path) -> None:
    command = ["--profile", str(profile), "--prompt", "the cat", "--max-new-tokens", "4", "--json"]
    assert main([*command, "--save-predictor"]) == 0
    assert _saved(profile).arrays["decode_tokens"].tolist() == [3]
    assert main([*command, "--save-predictor"]) == 0
    assert _saved(profile).arrays["decode_tokens"].tolist() == [3, 3]
    assert main([*command, "--save-predictor", str(tmp_path / "other")]) == 0
    other = read_artifact(tmp_path / "other", kind="activation_matrix", shape=SHAPE)
    assert other.arrays["decode_tokens"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("overrides", "file", "reason"),
    [
        ({"predictor.kind": "previous_token", "predictor.artifact": None}, "x", "'previous_token' learns nothing here"),
        ({"prefetch.depth": 0, "cache.policy": "lru"}, "x", "while something goes by it"),
        ({"predictor.artifact": None}, None, "no file to save the predictor to"),
    ],
)
def test_what_cannot_be_saved(checkpoint: Path, overrides: dict[str, object], file: str | None, reason: str) -> None:
    keys = {name: value for name, value in {**KEYS, **overrides}.items() if value is not None}
    with runtime.load(checkpoint, overrides=keys) as engine, pytest.raises(UsageError, match=reason):
        engine.save_predictor(file)


def test_a_resident_model_has_nothing_to_save(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as engine, pytest.raises(UsageError, match="learns nothing"):
        engine.save_predictor("x")


def test_no_other_file_is_overwritten_and_no_text_is_made_first(
    profile: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint / "model.safetensors"
    before = weights.read_bytes()
    assert main(["--profile", str(profile), "--prompt", "the cat", "--save-predictor", str(weights)]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"error: {weights}: exists, and is no activation_matrix")
    assert not captured.out
    assert weights.read_bytes() == before


def test_a_damaged_collection_is_no_cold_start(profile: Path) -> None:
    (profile.parent / "learned").mkdir()
    (profile.parent / "learned" / "eam.safetensors").write_bytes(b"no collection")
    with pytest.raises(ArtifactError, match="damaged"):
        runtime.load(profile)


def test_a_trained_predictor_must_be_there(profile: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read the predictor"):
        runtime.load(profile, overrides={"predictor.kind": "periodic"})
