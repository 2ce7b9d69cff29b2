"""Where profiles are looked up, which one is taken, what is wrong with one; the command. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import CheckpointError, ProfileError
from runtime.profile import (
    MachineFacts,
    ModelIdentity,
    Profile,
    checkpoint_of,
    find_profile,
    load_profile,
    portable,
    save_profile,
)
from runtime.profile.__main__ import json_schema, main
from runtime.profile.lint import lint
from runtime.profile.lookup import Judged, candidate, candidates, judge, places
from runtime.profile.matching import machine_facts

ROOT = Path(__file__).parent.parent
MODEL = ModelIdentity(architecture="Demo", layers=8, experts=32, top_k=4, expert_bytes=4096, dtype="bfloat16")
OTHER = MODEL.model_copy(update={"experts": 64})
MACHINE = MachineFacts("cpu", 16_000_000_000, versions={"torch": "2.13.1"})
NOW = datetime(2026, 11, 1, tzinfo=UTC)
TUNED: dict[str, Any] = {
    "match.device": "cpu",
    "match.memory_total_bytes": 16_000_000_000,
    "match.model": MODEL.model_dump(),
    "cache.policy": "lru",
    "objectives": {"latency_ms_p50": 50.0, "peak_memory_bytes": 700},
    "evidence": {
        "baseline": {"latency_ms_p50": 100.0, "peak_memory_bytes": 800},
        "ratio": {"estimate": 0.5, "low": 0.4, "high": 0.6},
        "pairs": 12,
    },
    "provenance.created": "2026-10-01T00:00:00+00:00",
    "provenance.model": "org/name",
    "provenance.versions": {"torch": "2.13.0"},
    "provenance.commit": "abc123",
    "provenance.command": "python -m harness.tune",
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two folders of EXPERTFLOW_PROFILES, the user's, and where nothing is."""
    found = {name: tmp_path / name for name in ("first", "second", "config", "empty")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setenv("EXPERTFLOW_PROFILES", f"{found['first']}:{found['second']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(found["config"]))
    monkeypatch.chdir(found["empty"])
    found["user"] = found["config"] / "expertflow" / "profiles"
    return found


def put(path: Path, **changes: Any) -> Path:
    """A sound tuned profile at `path`; double underscores in names of `changes` stand for dots."""
    keys = {**TUNED, **{name.replace("__", "."): value for name, value in changes.items()}}
    save_profile(Profile.default().with_overrides(keys), path)
    return path


def judged(model: ModelIdentity = MODEL, machine: MachineFacts = MACHINE) -> dict[str, Judged]:
    return {one.candidate.path.name: one for one in judge(list(candidates()), model, machine, NOW)}


def taken(found: dict[str, Judged]) -> list[str]:
    return [name for name, one in found.items() if one.is_used]


def test_the_places_in_their_order(folders: dict[str, Path]) -> None:
    found = [(place.name, place.folder) for place in places()]
    assert found == [
        ("EXPERTFLOW_PROFILES", folders["first"]),
        ("EXPERTFLOW_PROFILES", folders["second"]),
        ("user", folders["user"]),
        ("shipped", ROOT / "profiles"),
    ]


def test_without_settings_the_user_s_folder_is_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXPERTFLOW_PROFILES", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert next(place.folder for place in places()) == tmp_path / ".config" / "expertflow" / "profiles"


def test_a_name_is_looked_up_place_after_place(folders: dict[str, Path]) -> None:
    last, middle = put(folders["user"] / "p.yaml"), put(folders["second"] / "p.yaml")
    assert find_profile("p.yaml") == find_profile("p") == middle
    first = put(folders["first"] / "p.yml")
    assert find_profile("p") == first and find_profile("p.yaml") == middle
    here = put(folders["empty"] / "p.yaml")
    assert find_profile("p.yaml").absolute() == here
    assert find_profile(str(last)) == last, "a path is a path"
    assert find_profile("default") == ROOT / "profiles" / "default.yaml"


def test_a_relative_path_is_tried_beside_the_profile_first(folders: dict[str, Path]) -> None:
    put(folders["empty"] / "p.yaml")
    beside = put(folders["second"] / "p.yaml")
    assert find_profile("p.yaml", beside=folders["second"]) == beside


def test_an_id_finds_the_profile_that_runs_alike(folders: dict[str, Path]) -> None:
    put(folders["first"] / "other.yaml", cache__policy="lfu")
    path = put(folders["user"] / "p.yaml")
    same = load_profile(path).with_overrides({"objectives.hit_rate": 0.5}).id
    assert find_profile(same) == path and same.startswith("sha256:")
    with pytest.raises(ProfileError, match="no profile is called sha256:0"):
        find_profile("sha256:0")


@pytest.mark.parametrize(
    "name", ["gone", "gone.yaml", "x/gone.yaml", "\0", "a" * 5000, "~nobody-at-all/p.yaml", ".", ""]
)
def test_what_is_not_there_is_one_line_with_the_way_out(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(ProfileError, match=r"runtime\.profile explain") as caught:
        find_profile(name)
    assert "\n" not in str(caught.value)


def test_the_better_level_wins_wherever_it_is(folders: dict[str, Path]) -> None:
    put(folders["first"] / "compatible.yaml", match__memory_total_bytes=8_000_000_000)
    put(folders["user"] / "exact.yaml")
    found = judged()
    assert taken(found) == ["exact.yaml"]
    assert found["compatible.yaml"].why == "another fits better"


def test_then_the_more_specific_then_the_earlier_place_then_the_newer(folders: dict[str, Path]) -> None:
    put(folders["first"] / "a.yaml")
    specific = put(folders["user"] / "b.yaml", match__bandwidth_at_expert_size_bytes_per_s={"min": 1e9})
    fast = MachineFacts("cpu", 16_000_000_000, 2e9)
    found = judged(machine=fast)
    assert taken(found) == ["b.yaml"] and found["a.yaml"].why == "another says more about where it holds"
    specific.unlink()
    put(folders["second"] / "c.yaml", provenance__created="2026-10-20T00:00:00+00:00")
    found = judged()
    assert taken(found) == ["a.yaml"] and found["c.yaml"].why == "another is looked up earlier"
    put(folders["first"] / "d.yaml", provenance__created="2026-10-20")
    found = judged()
    assert taken(found) == ["d.yaml"] and found["a.yaml"].why == "another is newer"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"match__memory_total_bytes": 64_000_000_000}, "is stale"),
        ({"match__device": "cuda:H100"}, "is for something else; fallback: default"),
        ({"match__model": OTHER.model_dump()}, "is for something else"),
        ({"match__model": None}, "does not say which model"),
        ({"numerics": "lossy.substitute"}, "changes results"),
        ({"numerics": "equivalent", "miss": "auto"}, "numerics equivalent changes results"),
        ({"predictor": {"kind": "sequence", "artifact": "gone.safetensors"}}, "artefact is missing"),
    ],
)
def test_what_is_never_taken_unasked(folders: dict[str, Path], changes: dict[str, Any], why: str) -> None:
    path = put(folders["first"] / "p.yaml", **changes)
    found = judged()
    assert not taken(found) and why in found["p.yaml"].why
    named = judge([candidate(path)], MODEL, MACHINE, NOW)[0]
    assert named.is_used == (why.split()[0] in ("is", "does", "changes", "numerics") and "else" not in why)


def test_a_file_that_cannot_be_read_hides_no_other(folders: dict[str, Path]) -> None:
    (folders["first"] / "broken.yaml").write_text("cache: [")
    (folders["first"] / "folder.yaml").mkdir()
    put(folders["user"] / "p.yaml")
    found = judged()
    assert taken(found) == ["p.yaml"]
    assert "cannot be read: not valid YAML" in found["broken.yaml"].why
    assert "directory" in found["folder.yaml"].why


def test_the_default_that_ships_is_never_taken_for_a_model(folders: dict[str, Path]) -> None:
    found = judged()
    assert not taken(found) and "does not say which model" in found["default.yaml"].why


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["explain", "--json", *arguments]) == 0
    return {Path(one["path"]).name: one for one in json.loads(capsys.readouterr().out)["profiles"]}


def test_explain_names_the_winner_of_each_model_and_why_others_lost(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    total = {"match__memory_total_bytes": None}
    put(folders["first"] / "a.yaml", **total)
    put(folders["user"] / "b.yaml", **total)
    put(folders["user"] / "c.yaml", match__model=OTHER.model_dump(), **total)
    found = explained(capsys)
    assert {name for name, one in found.items() if one["is_used"]} >= {"a.yaml", "c.yaml"}
    assert found["b.yaml"]["why_not"] == "another is looked up earlier" and found["b.yaml"]["place"] == "user"
    assert found["a.yaml"]["id"] == load_profile(folders["first"] / "a.yaml").id
    assert main(["explain"]) == 0
    text = capsys.readouterr().out
    assert text.index("EXPERTFLOW_PROFILES") < text.index("user") < text.index("shipped")
    assert "not taken: another is looked up earlier" in text and "does not say how much memory" in text


def test_explain_of_named_files(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    put(folders["empty"] / "stale.yaml", match__memory_total_bytes=1 << 60)
    put(folders["empty"] / "gpu.yaml", match__device="cuda:H100")
    found = explained(capsys, "stale.yaml", "gpu.yaml")
    assert found["stale.yaml"]["level"] == "stale" and found["stale.yaml"]["is_used"]
    assert found["gpu.yaml"]["level"] == "rejected" and "fallback: default" in found["gpu.yaml"]["why_not"]
    assert main(["explain", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: no profile is called nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evidence": None}, "what was measured is missing"),
        ({"evidence__baseline": None}, "was not measured beside it"),
        ({"evidence__ratio": None}, "not confirmed"),
        ({"evidence__pairs": None}, "not confirmed"),
        ({"evidence__ratio": {"estimate": 0.9, "low": 0.4, "high": 0.6}}, "is not within"),
        (
            {"evidence__ratio": {"estimate": 0.9, "low": 0.8, "high": 1.1}, "objectives__peak_memory_bytes": 800},
            "no gain is proven",
        ),
        ({"limits__max_memory_bytes": 699}, "above limits.max_memory_bytes"),
        ({"limits__slo_tpot_ms": 5, "objectives__tpot_ms_p50": 6.0}, "above limits.slo_tpot_ms"),
        ({"match__device": None}, "one of them is missing"),
        ({"provenance__created": "yesterday"}, "ISO 8601"),
        ({"provenance__created": "2031-01-01T00:00:00+00:00"}, "in the future"),
        ({"provenance__model": "/home/me/models/m"}, "folder of one machine: /home/"),
        ({"provenance__command": "/root/.venv/bin/python -m harness.tune"}, "folder of one machine: /root"),
        ({"provenance__command": "HF_TOKEN=abc python -m harness.tune"}, "provenance.command: looks like a secret"),
        ({"provenance__command": "tune --storage postgresql://me:pw@host/db"}, "looks like a secret"),
        ({"provenance__hardware": {"api_key": "x"}}, "provenance.hardware.api_key: looks like a secret"),
        ({"predictor": {"kind": "sequence", "artifact": "gone.safetensors"}}, "has to come with the profile"),
        ({"fallback": "gone"}, "no profile is called gone"),
        ({"fallback": "p.yaml"}, "is the profile itself"),
        ({"numerics": "lossy.substitute"}, "its cost was not measured"),
        ({"numerics": "equivalent", "miss": "compute"}, "its cost was not measured"),
    ],
)
def test_lint_refuses(folders: dict[str, Path], changes: dict[str, Any], says: str) -> None:
    path = put(folders["first"] / "p.yaml", **changes)
    errors = [one.message for one in lint(path, NOW) if one.severity == "error"]
    assert len(errors) == 1 and says in errors[0], errors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"provenance__created": "2026-01-01T00:00:00+00:00"}, "measured 304 days ago"),
        ({"provenance__commit": "abc123+"}, "changes that nobody else has"),
        ({"provenance__versions": None}, "provenance.versions: missing"),
    ],
)
def test_lint_warns(folders: dict[str, Path], changes: dict[str, Any], says: str) -> None:
    (problem,) = lint(put(folders["first"] / "p.yaml", **changes), NOW)
    assert problem.severity == "warning" and says in problem.message


def test_lint_finds_nothing_where_nothing_is_wrong(folders: dict[str, Path]) -> None:
    assert lint(put(folders["first"] / "p.yaml"), NOW) == []
    saves = {"evidence__ratio": {"estimate": 1.0, "low": 0.98, "high": 1.02}}
    assert lint(put(folders["first"] / "p.yaml", **saves), NOW) == [], "it saves memory"
    assert lint(put(folders["first"] / "p.yaml", provenance__model="cache:demo", fallback="default"), NOW) == []


def test_the_command_prints_a_line_for_each_problem(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(folders["first"] / "p.yaml", fallback="gone", provenance__created=None)
    broken = folders["first"] / "b.yaml"
    broken.write_text("schema_version: 1\nkind: moe-offload-profile\ncach: {}\n")
    assert main(["lint", str(path), str(broken), str(folders["first"] / "gone.yaml")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(": error: " in line for line in lines)
    assert "unknown key 'cach'" in lines[2] and "No such file" in lines[3]
    assert main(["lint", "--json", str(ROOT / "profiles" / "default.yaml")]) == 0
    assert list(json.loads(capsys.readouterr().out).values()) == [[]]


def _shipped() -> list[Path]:
    """Those that git knows: beside them lie what users have tuned for themselves."""
    listed = ["git", "-C", str(ROOT), "ls-files", "profiles/*.yaml"]
    known = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in known] or sorted((ROOT / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: path.name)
def test_profiles_that_ship_are_sound(path: Path) -> None:
    created = load_profile(path).provenance
    now = datetime.now(UTC) + timedelta(days=1) if created else None  # clocks of machines differ
    assert [one.message for one in lint(path, now) if one.severity == "error"] == []


def test_the_schema_that_ships_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    shipped = (ROOT / "profiles" / "schema.json").read_text()
    assert capsys.readouterr().out == shipped, "python -m runtime.profile schema > profiles/schema.json"


def test_the_schema_takes_what_the_reader_takes_and_refuses_what_it_refuses(folders: dict[str, Path]) -> None:
    import jsonschema

    from runtime import strict_yaml

    validator = jsonschema.Draft202012Validator(json_schema())
    for path in (ROOT / "profiles" / "default.yaml", put(folders["first"] / "p.yaml")):
        validator.validate(strict_yaml.parse(path.read_text()))
    head = {"schema_version": 1, "kind": "moe-offload-profile"}
    assert validator.is_valid({**head, "cache": {"slots": "25%"}, "limits": {"max_memory_bytes": "1.5GiB"}})
    for wrong in (
        {"cach": {}},
        {"cache": {"policy": "lruu"}},
        {"cache": {"slots": "25"}},
        {"limits": {"slo_tpot_ms": 0}},
    ):
        assert not validator.is_valid({**head, **wrong})


def test_a_checkpoint_of_the_cache_is_named_without_this_machine_s_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, home, elsewhere = tmp_path / "cache", tmp_path / "home", tmp_path / "elsewhere"
    (cache / "demo-x").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(cache))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    assert portable(str(cache / "demo-x")) == "cache:demo-x"
    assert portable(str(home / "models" / "m")) == "~/models/m"
    assert portable(str(elsewhere / "m")) == "m" and portable("org/name") == "org/name"
    assert portable("/models/m") == "/models/m"
    profile = Profile.default().with_overrides({"provenance.model": "cache:demo-x"})
    assert checkpoint_of(profile) == str(cache / "demo-x")
    home_s = profile.with_overrides({"provenance.model": "~/models/m"})
    assert checkpoint_of(home_s) == str(home / "models" / "m")
    assert checkpoint_of(Profile.default()) is None
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(elsewhere))
    command = "python -m harness.demo --expert-bytes 1044480"
    with pytest.raises(CheckpointError, match=f"not at {elsewhere}/demo-x; make it: {command}"):
        checkpoint_of(profile.with_overrides({"provenance.model_command": command}))
    with pytest.raises(CheckpointError, match="--model"):
        checkpoint_of(profile)


def test_the_demo_s_command_makes_the_folder_that_it_is_asked_about(tmp_path: Path) -> None:
    from harness.demo.__main__ import run
    from harness.demo.widen import command_of, widened
    from harness.report.profiles import provenance

    folder = widened(128 << 10, tmp_path, layout="fused", shard_bytes=64 << 20)
    command = command_of(folder)
    assert command is not None and command.startswith("python -m harness.demo ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTFLOW_CACHE", str(tmp_path))
        told = provenance(str(folder), "/opt/a/python -m harness.tune --model a/b --out /srv/c/run && python -m b")
        assert told.command == "python -m harness.tune --model a/b --out run && python -m b"
    assert (told.model, told.model_command) == (f"cache:{folder.name}", command)
    assert command_of(tmp_path / "Qwen3-30B-A3B") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTFLOW_CACHE", str(tmp_path / "again"))
        assert run(command.split()[3:]) == 0
    assert (tmp_path / "again" / folder.name).is_dir()


def test_explain_and_lint_need_no_torch(folders: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from runtime.profile.__main__ import main; "
        f"sys.exit(main(['explain']) or main(['lint', {str(ROOT / 'profiles' / 'default.yaml')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, its name in profiles."""
    from runtime import devices

    here = MachineFacts(f"cuda:{GPU}", 80 << 30)
    monkeypatch.setattr(devices, "_num_gpus", lambda: 1)
    monkeypatch.setattr(devices, "_name", lambda device: here.device)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "device_facts", lambda device: here if device.type == "cuda" else machine_facts())
    return here.device


GPU = "NVIDIA H200"


def test_explain_judges_by_the_device_that_is_named(
    folders: dict[str, Path], gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(folders["first"] / "gpu.yaml", **{"match.device": gpu, "match.memory_total_bytes": 80 << 30})
    assert explained(capsys)["gpu.yaml"]["level"] == "rejected"
    assert explained(capsys, "--device", "cuda:0")["gpu.yaml"]["is_used"]
    assert explained(capsys, str(path))["gpu.yaml"]["is_used"], "a profile that is named runs on its GPU"
    assert main(["explain", str(path)]) == 0
    assert capsys.readouterr().out.startswith("for cuda:NVIDIA H200 with 85.9 GB of memory\n")


@pytest.mark.parametrize(
    ("device", "decode", "said"),
    [
        ("cuda:0", "eager", ["error: match.device: 'cuda:0' is neither cpu nor a GPU by its name"]),
        ("gpu", "eager", ["error: match.device: 'gpu' is neither"]),
        ("cuda:NVIDIA H200", "gemv", ["warning: compute.decode: gemv is for the CPU"]),
        ("cuda:NVIDIA H200", "eager", []),
        ("cpu", "gemv", []),
    ],
)
def test_lint_reads_the_device(folders: dict[str, Path], device: str, decode: str, said: list[str]) -> None:
    path = put(folders["first"] / "p.yaml", **{"match.device": device, "compute.decode": decode})
    found = [f"{one.severity}: {one.message}" for one in lint(path) if "device" in one.message or "gemv" in one.message]
    assert len(found) == len(said) and all(one.startswith(head) for one, head in zip(found, said, strict=True))
