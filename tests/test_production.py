"""Loading a tuned profile with eyes closed: exact, compatible, stale, rejected; fallback, strict, probe, clamped."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import loading, machine
from runtime.errors import ArtifactError, BudgetError, CheckpointError, ProfileError
from runtime.facts import BUFFER_BYTES, CUDA_BUFFER_BYTES, ModelFacts, describe, resolve
from runtime.loading import choose
from runtime.model import checkpoint_files, meta_model
from runtime.predictors.artifact import RoutingShape
from runtime.probe import engine_bandwidth
from runtime.profile import MatchResult, Profile, load_profile, machine_facts, save_profile

ROOT = Path(__file__).parent.parent
GIB = 1 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def facts(checkpoint: Path) -> ModelFacts:
    return describe(checkpoint)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of EXPERTFLOW_PROFILES; the user has none."""
    found = tmp_path / "profiles"
    found.mkdir()
    monkeypatch.setenv("EXPERTFLOW_PROFILES", str(found))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    return found


@pytest.fixture
def put(folder: Path, checkpoint: Path, facts: ModelFacts) -> Any:
    """Writes a profile that fits exactly, but for the changes; "__" in names stands for dots."""

    def write(name: str = "p.yaml", **changes: Any) -> Path:
        keys: dict[str, Any] = {
            "match.device": "cpu",
            "match.memory_total_bytes": machine.total_memory_bytes(),
            "match.model": facts.identity.model_dump(),
            "cache.policy": "lru",
            "cache.slots": 7,
            "provenance.model": str(checkpoint),
            "provenance.versions": dict(machine_facts().versions),
        }
        keys.update({name.replace("__", "."): value for name, value in changes.items()})
        save_profile(Profile.default().with_overrides(keys), folder / name)
        return folder / name

    return write


STALE = {"match__memory_total_bytes": 1 << 60}
REJECTED = {"match__device": "cuda:NVIDIA H100"}


def test_an_exact_profile_runs_and_says_nothing(put: Any) -> None:
    with runtime.load(put()) as engine:
        assert engine.match is not None and engine.match.level == "exact" and not engine.notes
        assert (engine.profile.cache.slots, engine.profile.cache.policy) == (7, "lru")


def test_a_profile_is_found_by_its_id(put: Any) -> None:
    found = choose(load_profile(put()).id)
    assert found.match is not None and found.match.level == "exact" and found.profile.cache.slots == 7


def test_a_compatible_one_runs_and_says_why(put: Any) -> None:
    found = choose(put(match__memory_total_bytes=machine.total_memory_bytes() // 2))
    assert found.match is not None and found.match.level == "compatible" and found.profile.cache.policy == "lru"
    assert found.notes[0].startswith("profile compatible: memory: profile ")


def test_other_versions_and_an_old_measurement_are_worth_a_check(put: Any) -> None:
    old = {"provenance__versions": {"torch": "1.0.0"}, "provenance__created": "2020-01-01T00:00:00+00:00"}
    found = choose(put(**old), strict=True)
    assert found.match is not None and found.match.level == "compatible"
    assert "measured with torch 1.0.0, here " in found.notes[0] and "harness.check --profile" in found.notes[0]
    assert "days ago" in found.notes[1]


def test_a_stale_one_runs_with_a_warning_and_strict_refuses_it(put: Any) -> None:
    path = put(**STALE)
    with runtime.load(path) as engine:
        assert engine.match is not None and engine.match.level == "stale"
        assert engine.profile.cache.policy == "lru" and engine.notes[0].startswith("profile stale: memory: ")
    with pytest.raises(ProfileError, match=r"is stale here \(memory: .*harness\.tune --model"):
        runtime.load(path, strict=True)


def test_instead_of_one_for_a_gpu_the_default_runs_without_the_limit_of_its_memory(put: Any, checkpoint: Path) -> None:
    path = put(**REJECTED, limits__max_memory_bytes=64 * GIB, workload__context=128)
    with runtime.load(path) as engine:
        assert engine.match is not None and engine.match.level == "rejected"
        assert engine.profile.cache.policy == Profile.default().cache.policy and engine.source == str(checkpoint)
        assert engine.profile.workload is not None and engine.profile.workload.context == 128
        assert engine.profile.max_memory_bytes is None
        note, of_limit = engine.notes
    assert "device: profile cuda:NVIDIA H100, here cpu" in note and "the default configuration runs instead" in note
    assert note.endswith(f"python -m harness.tune --model {checkpoint}")
    assert of_limit == "its limit of 68.7 GB is of cuda:NVIDIA H100's memory and does not count on cpu"
    with pytest.raises(ProfileError, match=r"another model or machine \(device: .*harness\.tune"):
        runtime.load(path, strict=True)


def test_a_profile_of_another_model_leaves_the_checkpoint_that_was_given(put: Any, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", experts=4)
    with runtime.load(put(limits__max_memory_bytes=64 * GIB), other) as engine:
        assert engine.match is not None and engine.match.level == "rejected" and engine.source == str(other)
        assert engine.profile.max_memory_bytes == 64 * GIB
        assert "model experts: profile 8, here 4" in engine.notes[0]
        inputs = engine.tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
        engine.model.generate(**inputs, max_new_tokens=4)
    with pytest.raises(ProfileError, match="model experts"):
        choose(put(), other, strict=True)


def test_the_reference_runs_through_the_kernels_of_what_is_loaded(put: Any) -> None:
    put("other.yaml", compute__decode="eager")
    path = put(**REJECTED, fallback="other", compute__decode="grouped_mm")
    with runtime.load(path) as engine, runtime.load_reference(path) as reference:
        assert engine.kernels == reference.kernels and reference.profile.compute.decode == "eager"


@pytest.mark.parametrize("named_by", ["name", "path", "id"])
def test_a_named_fallback_runs_and_keeps_the_smaller_limit(put: Any, folder: Path, named_by: str) -> None:
    other = put("other.yaml", cache__policy="lfu", limits__max_memory_bytes=9 * GIB)
    names = {"name": "other", "path": "other.yaml", "id": load_profile(other).id}
    for limit, kept in ((8 * GIB, 8 * GIB), (10 * GIB, 9 * GIB), (None, 9 * GIB)):
        rejected = {"match__model__experts": 4}
        found = choose(put(**rejected, fallback=names[named_by], limits__max_memory_bytes=limit))
        assert found.profile.cache.policy == "lfu" and found.profile.max_memory_bytes == kept
        assert found.match is not None and found.match.level == "rejected"
        assert len(found.notes) == 1 and f"profile {other} runs instead" in found.notes[0]


def test_a_fallback_that_is_rejected_too_leads_to_its_own(put: Any) -> None:
    put("third.yaml", cache__policy="lfru", **STALE)
    put("second.yaml", **REJECTED, fallback="third")
    found = choose(put(**REJECTED, fallback="second"))
    assert found.profile.cache.policy == "lfru"
    assert "third.yaml runs instead" in found.notes[0] and found.notes[1].startswith("profile stale")
    put("third.yaml", **REJECTED)
    assert choose(put(**REJECTED, fallback="second")).profile.is_default


def test_fallbacks_that_go_in_a_circle_are_refused(put: Any) -> None:
    put("second.yaml", **REJECTED, fallback="p.yaml")
    with pytest.raises(ProfileError, match=r"in a circle: .*p\.yaml -> .*second\.yaml -> .*p\.yaml"):
        choose(put(**REJECTED, fallback="second"))
    with pytest.raises(ProfileError, match="in a circle"):
        choose(put(**REJECTED, fallback="p"))


def test_a_fallback_that_is_not_there(put: Any) -> None:
    with pytest.raises(
        ProfileError, match=r"p\.yaml is for another .*its fallback cannot run: no profile is called gone"
    ):
        choose(put(**REJECTED, fallback="gone"))
    choose(put(fallback="gone"))  # not asked for


@pytest.mark.parametrize(("measured", "level"), [(1.9e9, "exact"), (1.4e9, "stale")])
def test_the_probe_is_held_against_the_profile(
    put: Any, monkeypatch: pytest.MonkeyPatch, measured: float, level: str
) -> None:
    asked: list[dict[str, Any]] = []

    def probed(*_: Any, **options: Any) -> float:
        asked.append(options)
        return measured

    monkeypatch.setattr(loading, "engine_bandwidth", probed)
    path = put(match__bandwidth_at_expert_size_bytes_per_s={"min": 1.5e9}, transfer__io_threads=3)
    found = choose(path, probe=True)
    assert found.match is not None and found.match.level == level
    assert asked == [{"io_threads": 3, "budget_s": 2.0}]
    choose(path, probe=0.25)
    assert asked[1]["budget_s"] == 0.25
    if level == "stale":
        assert found.notes == ("profile stale: bandwidth at expert size: profile at least 1.50 GB/s, here 1.40 GB/s",)
        with pytest.raises(ProfileError, match=r"1\.40 GB/s"):
            choose(path, probe=True, strict=True)
    assert choose(path).match == MatchResult("exact", ("bandwidth at expert size was not measured here",))


def test_the_probe_goes_through_the_engine_s_own_transfer(put: Any, checkpoint: Path) -> None:
    loaded, files = meta_model(str(checkpoint)), checkpoint_files(str(checkpoint))
    assert engine_bandwidth(loaded, files, io_threads=1, budget_s=0.05) > 0
    found = choose(put(match__bandwidth_at_expert_size_bytes_per_s={"min": 1e15}), probe=0.05)
    assert found.match is not None and found.match.level == "stale"


def test_slots_are_clamped_to_a_control_group_to_the_limit_and_to_the_kv_cache(
    facts: ModelFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up host of 16 GiB, 12 of them free, and a process that has 1 GiB."""
    files = {
        "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {12 << 20} kB",
        "proc/self/status": f"VmRSS: {1 << 20} kB",
        "proc/self/cgroup": "0::/job",
        "proc/self/mountinfo": f"35 31 0:32 / {tmp_path}/cg rw - cgroup2 cgroup rw",
        "cg/job/memory.max": "max",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    many = replace(facts, num_experts_total=10_000, slot_bytes=GIB // 100)
    kv_bytes = 2 * GIB

    def clamped(**keys: Any) -> tuple[int, str]:
        overrides = {"cache.slots": 8000, "cache.kv_bytes": kv_bytes}
        overrides.update({name.replace("__", "."): value for name, value in keys.items()})
        profile, notes = resolve(Profile.default().with_overrides(overrides), many)
        assert isinstance(profile.cache.slots, int)
        return profile.cache.slots, " ".join(notes)

    def fit(limit_bytes: int, kv: int = kv_bytes) -> int:
        return (limit_bytes - GIB - BUFFER_BYTES - facts.dense_bytes - kv) // many.slot_bytes

    slots = fit(13 * GIB)
    assert clamped() == (slots, f"8000 slots asked for, {slots} fit the memory: 14.0 GB in all, by what is free now")
    assert clamped(cache__kv_bytes=GIB)[0] == fit(13 * GIB, GIB)
    slots, note = clamped(limits__max_memory_bytes=6 * GIB)
    assert slots == fit(6 * GIB) and "6.44 GB in all, by limits.max_memory_bytes" in note
    (tmp_path / "cg/job/memory.max").write_text(str(5 * GIB))
    (tmp_path / "cg/job/memory.current").write_text(str(GIB))
    slots, note = clamped(limits__max_memory_bytes=6 * GIB)
    assert slots == fit(5 * GIB) and "by what is free now" in note
    assert clamped(cache__slots=100) == (100, "")
    assert clamped(cache__slots=None) == (fit(5 * GIB), ""), "as many as fit is what was asked for"
    with pytest.raises(BudgetError, match="no room for one expert"):
        clamped(cache__kv_bytes=5 * GIB)


def test_a_gpu_keeps_room_for_the_rows_of_a_long_prompt(facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4096 elements for each of a token's eight experts: of 32,768 tokens they alone are 2 GiB."""
    text = facts.config.get_text_config()
    monkeypatch.setattr(text, "hidden_size", 4096)
    monkeypatch.setattr("runtime.facts.free_bytes", lambda device: 16 * GIB)
    many = replace(facts, num_experts_total=10_000, slot_bytes=GIB // 100, top_k=8)
    found = []
    for context in (64, 32_768):
        overrides = {"cache.kv_bytes": GIB, "workload.context": context}
        profile, _ = resolve(Profile.default().with_overrides(overrides), many, torch.device("cuda", 0))
        found.append(profile.cache.slots)
    short, long = found
    assert short == (16 * GIB - GIB - CUDA_BUFFER_BYTES - facts.dense_bytes) // many.slot_bytes
    assert short - long > (2 * GIB - CUDA_BUFFER_BYTES) // many.slot_bytes


def test_what_is_clamped_runs_and_says_so(put: Any, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "resident_bytes", lambda: GIB)
    fixed = GIB + BUFFER_BYTES + facts.dense_bytes + machine.kv_cache_bytes(facts.config, 64, 1, facts.dtype.itemsize)
    limit = {"limits__max_memory_bytes": fixed + 5 * facts.slot_bytes, "workload__context": 64}
    with runtime.load(put(cache__slots="100%", **limit)) as engine:
        assert engine.profile.cache.slots == 5 and engine.match is not None and engine.match.level == "exact"
        assert len(engine.notes) == 1 and engine.notes[0].startswith("24 slots asked for, 5 fit the memory")
        inputs = engine.tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
        engine.model.generate(**inputs, max_new_tokens=4)
        engine.check_integrity()
    with pytest.raises(BudgetError, match="no room for one expert"):
        runtime.load(put(limits__max_memory_bytes=fixed, workload__context=64))


def test_a_checkpoint_runs_with_the_best_profile_that_is_found(put: Any, checkpoint: Path) -> None:
    put("a.yaml", match__memory_total_bytes=machine.total_memory_bytes() // 2)
    best = put("b.yaml", limits__max_memory_bytes=64 * GIB)
    with runtime.load(checkpoint) as engine:
        assert engine.match is not None and engine.match.level == "exact" and engine.profile.cache.slots == 7
        (note,) = engine.notes
    assert f"profile {best} is used (exact), within 68.7 GB; without it: runtime.load('default.yaml'" in note
    found = choose(checkpoint, overrides={"cache.slots": 5})
    assert (found.profile.cache.slots, found.profile.cache.policy) == (5, "lru")
    without = choose("default.yaml", checkpoint)
    assert without.profile.is_default and not without.notes


def test_a_stale_or_broken_one_is_named_and_not_used(put: Any, folder: Path, checkpoint: Path) -> None:
    stale = put(**STALE)
    (folder / "broken.yaml").write_text("cache: [")
    found = choose(checkpoint)
    assert found.profile.is_default and found.match is None
    assert f"{folder / 'broken.yaml'} is not used: cannot be read" in found.notes[0]
    assert f"{stale} is not used: is stale: taken only where it is named; memory: " in found.notes[1]


def test_where_nothing_is_for_the_model_nothing_is_said(put: Any, tmp_path: Path) -> None:
    put()
    found = choose(save_tiny(tmp_path / "other", experts=4))
    assert found.profile == Profile.default() and not found.notes


def test_what_was_learned_comes_with_the_profile_wherever_it_lies(
    put: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = {"kind": "activation_matrix", "artifact": "learned/eam.safetensors"}
    path = put(predictor=predictor, prefetch__on_trial=False, cache__policy="activation")
    with runtime.load(path) as engine:
        inputs = engine.tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
        engine.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        engine.save_predictor()
    moved = Path(copytree(folder, tmp_path / "elsewhere" / "moved"))
    monkeypatch.setenv("EXPERTFLOW_PROFILES", str(moved))
    monkeypatch.chdir(tmp_path)
    for source in (moved / "p.yaml", "p.yaml", Path("elsewhere/moved/p.yaml")):
        with runtime.load(source) as engine:
            assert not engine.notes, "it is there: no cold start"
            assert engine.predictor_file().samefile(moved / "learned" / "eam.safetensors")


def test_a_missing_artefact_is_refused_before_weights_are_loaded(
    put: Any, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(predictor={"kind": "sequence", "artifact": "gone.safetensors"})
    monkeypatch.setattr("runtime.build.load_offloaded", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ArtifactError, match=r"gone\.safetensors: .*comes with the profile.*harness\.fit sequence"):
        runtime.load(path)
    found = choose(checkpoint)
    assert found.profile.is_default and "artefact is missing" in found.notes[0]


def test_an_artefact_of_another_model_is_refused(put: Any, folder: Path) -> None:
    from runtime.predictors.artifact import Artifact, write_artifact

    shape = RoutingShape(LAYERS, EXPERTS + 1, TOP_K)
    write_artifact(folder / "a.safetensors", Artifact("sequence", "other", shape))
    with pytest.raises(ArtifactError, match=f"not to a model of {LAYERS} layers x {EXPERTS} experts"):
        runtime.load(put(predictor={"kind": "sequence", "artifact": "a.safetensors"}))


@pytest.mark.parametrize("model", ["a" * 5000, "cache:" + "a" * 5000, "~nobody-at-all/m", "", "a\nb", "cache:"])
def test_a_checkpoint_that_cannot_be_is_refused(put: Any, model: str) -> None:
    with pytest.raises(CheckpointError):
        choose(put(provenance__model=model))


@pytest.mark.parametrize("artifact", ["a" * 5000, ".", ""])
def test_an_artefact_that_cannot_be_is_refused(put: Any, artifact: str) -> None:
    with pytest.raises(ArtifactError):
        choose(put(predictor={"kind": "sequence", "artifact": artifact}))


def test_a_checkpoint_of_the_cache_is_found_and_its_absence_says_how_to_make_it(
    put: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(provenance__model="cache:demo", provenance__model_command="python -m harness.demo --expert-bytes 1")
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"make it: python -m harness\.demo --expert-bytes 1"):
        choose(path)
    assert choose(path, checkpoint).checkpoint == str(checkpoint)
    copytree(checkpoint, tmp_path / "cache" / "demo")
    assert choose(path).checkpoint == str(tmp_path / "cache" / "demo")


@pytest.mark.slow
def test_an_installed_wheel_finds_the_profiles_that_ship(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("runtime", "harness", "profiles"):
        copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    assert "profiles" in tomllib.loads((source / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("profiles/")}
        archive.extractall(tmp_path / "site")
    shipped = {f"profiles/{path.name}" for path in (ROOT / "profiles").iterdir() if path.suffix != ".pyc"}
    assert packed == shipped
    code = "from runtime.profile import find_profile; print(find_profile('default'))"
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(tmp_path / "site" / "profiles" / "default.yaml"), found.stderr
