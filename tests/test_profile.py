"""Profiles: strict reading, exact round trip, and matching against a model and a machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import profile as schema
from runtime import strict_yaml
from runtime.errors import ProfileError, UsageError
from runtime.profile import (
    MachineFacts,
    ModelIdentity,
    Profile,
    dump_profile,
    load_profile,
    match_profile,
    parse_overrides,
    save_profile,
)

ROOT = Path(__file__).parent.parent
HEAD = "schema_version: 1\nkind: moe-offload-profile\n"

IDENTITY = {
    "architecture": "DemoForCausalLM",
    "layers": 8,
    "experts": 32,
    "top_k": 4,
    "expert_bytes": 4096,
    "dtype": "bf16",
}
MATCH: dict[str, Any] = {
    "device": "cpu",
    "memory_total_bytes": 16_000_000_000,
    "bandwidth_at_expert_size_bytes_per_s": {"min": 1.5e9},
    "model": IDENTITY,
}
MODEL = ModelIdentity(**IDENTITY)
MACHINE = MachineFacts("cpu", 16_000_000_000, 2e9)


def load_text(tmp_path: Path, text: str | bytes) -> Profile:
    path = tmp_path / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_profile(path)


def test_the_shortest_profile_is_the_default_configuration(tmp_path: Path) -> None:
    assert load_text(tmp_path, HEAD) == Profile.default()


def test_the_default_that_ships_is_the_default_configuration() -> None:
    path = ROOT / "profiles" / "default.yaml"
    assert load_profile(path) == Profile.default()
    assert dump_profile(Profile.default()) == "".join(path.read_text().splitlines(keepends=True)[1:])


def test_every_section_of_the_format_is_read(tmp_path: Path) -> None:
    profile = load_text(
        tmp_path,
        HEAD
        + """
match: {device: "cuda:H100", memory_total_bytes: 80GB, bandwidth_at_expert_size_bytes_per_s: {min: 2e9}}
workload: {name: no, sha256: ab12, concurrency: 8, context: 4096}
limits: {max_memory_bytes: 1.5GiB, slo_tpot_ms: 25, slo_ttft_ms: 2e3}
cache: {slots: 25%, kv_bytes: 1000, policy: lru, params: {}}
prefetch: {depth: 0, count: 3}
predictor: {kind: none, every: 2, every_unit: step, artifact: null, params: {}}
scheduler: {kind: fifo, group: 8, window: 2}
compute: {prefill: eager, decode: grouped_mm, threads: 2}
transfer: {streams: 1, io_threads: 4}
tiers: {host_bytes: 4000}
miss: copy
numerics: exact
fixed: [cache.slots, limits.max_memory_bytes]
objectives: {latency_ms_p50: 12.5, tokens_per_s: 80, peak_memory_bytes: 400, fraction_of_bound: 0.8}
evidence: {baseline: {latency_ms_p50: 20.0}, ratio: {estimate: 0.6, low: 0.5, high: 0.7}, pairs: 9, trials: 20, oom: 0,
           seed: 0, simulator_rank_correlation: 0.7, memory_model_error: -0.02}
provenance: {created: 2026-11-22T03:40:00Z, versions: {torch: "2.13"}, commit: "1e5", hardware: {cores: 2}}
fallback: default
""",
    )
    assert profile.limits is not None and profile.limits.max_memory_bytes == 3 << 29
    assert profile.limits.slo_ttft_ms == 2000.0
    assert profile.cache.slots == "25%"
    assert profile.workload is not None and profile.workload.name == "no", "the Norway trap"
    assert profile.provenance is not None and profile.provenance.created == "2026-11-22T03:40:00Z"
    assert load_text(tmp_path, dump_profile(profile)) == profile


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["empty"]),
        ("# nothing\n", ["empty"]),
        ("- 1\n", ["mapping", "list"]),
        ("just text", ["mapping", "str"]),
        ("a: [1", ["not valid YAML", "flow sequence in line 1, column 4"]),
        ('{"model_type": "qwen3_moe"}', ["not a profile", "checkpoint is named by its folder"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
        ("[" * 600, ["nested too deeply"]),
        ("kind: moe-offload-profile\n", ["'schema_version' is missing"]),
        ("schema_version: 1\n", ["'kind' is missing"]),
        ("schema_version: 1\nkind: recipe\n", ["'recipe'", "moe-offload-profile"]),
        ("schema_version: 2\nkind: moe-offload-profile\nnovelty: 1\n", ["2 is newer than 1", "upgrade expertflow"]),
        ("schema_version: true\nkind: moe-offload-profile\n", ["schema_version", "True"]),
        (HEAD + "cache:\n  slots: 3\n  slots: 4\n", ["duplicate key 'slots' in line 5", "line 4"]),
        (HEAD + "cache: {slots: 3, slots: 3}\n", ["duplicate key 'slots'"]),
        (HEAD + "kind: moe-offload-profile\n", ["duplicate key 'kind' in line 3"]),
        (HEAD + "cache: {polcy: lru}\n", ["'cache.polcy'", "'cache.policy'"]),
        (HEAD + "slots: 3\n", ["'slots'", "'cache.slots'"]),
        (HEAD + "xyzzy: 3\n", ["unknown key 'xyzzy'; known keys: schema_version, kind, match,"]),
        (HEAD + "cache: {xyzzy: 3}\n", ["'cache.xyzzy'; known there: cache.slots, cache.kv_bytes,"]),
        (HEAD + "match: {model: {layer: 3}}\n", ["'match.model.layer'", "'match.model.layers'"]),
        (HEAD + "cache: {policy: lruu}\n", ["'lruu'", *schema.POLICIES]),
        (HEAD + "predictor: {kind: oracle}\n", ["'oracle'", *schema.PREDICTORS]),
        (HEAD + "scheduler: {kind: lifo}\n", ["'lifo'", *schema.SCHEDULERS]),
        (HEAD + "compute: {prefill: gemv}\n", ["'gemv'", *schema.PREFILL_KERNELS]),
        (HEAD + "compute: {decode: triton}\n", ["'triton'", *schema.DECODE_KERNELS]),
        (HEAD + "numerics: lossy.guess\n", ["lossy.guess", *schema.NUMERICS]),
        (HEAD + "cache: {params: {alpha: 1}}\n", ["takes no params", "alpha"]),
        (HEAD + "predictor: {artifact: a.pt}\n", ["takes no artifact", "a.pt"]),
        (HEAD + "fixed: [cache.slot]\n", ["'cache.slot'", "'cache.slots'"]),
        (HEAD + "cache: {slots: 0}\n", ["cache.slots", "0"]),
        (HEAD + "cache: {slots: 101%}\n", ["cache.slots", "101%"]),
        (HEAD + "cache: {slots: true}\n", ["cache.slots", "True"]),
        (HEAD + "cache: {slots: 2.5}\n", ["cache.slots", "2.5"]),
        (HEAD + "cache:\n", ["cache", "None"]),
        (HEAD + "prefetch: {depth: -1}\n", ["prefetch.depth", "-1"]),
        (HEAD + "compute: {threads: yes}\n", ["compute.threads", "'yes'"]),
        (HEAD + "compute: {threads: 1000000}\n", ["compute.threads", "1024", "1000000"]),
        (HEAD + "fallback: ''\n", ["fallback", "''"]),
        (HEAD + f"fallback: [{'x' * 5000}]\n", ["fallback", "[...]"]),
        (HEAD + "compute: {threads: 010}\n", ["compute.threads", "'010'"]),
        (HEAD + "limits: {max_memory_bytes: much}\n", ["limits.max_memory_bytes", "much"]),
        (HEAD + "limits: {slo_tpot_ms: .inf}\n", ["limits.slo_tpot_ms", ".inf"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str | bytes, says: list[str]) -> None:
    with pytest.raises(ProfileError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message and "p.yaml" in message
    assert all(word in message for word in says), message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"gone\.yaml: .*No such file"):
        load_profile(tmp_path / "gone.yaml")
    with pytest.raises(ProfileError, match="directory"):
        load_profile(tmp_path)


NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SIZE = st.integers(1, 2**50)
NUMBER = st.floats(min_value=5e-324, max_value=1.7e308)
SCALARS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), NAME)


def section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.fixed_dictionaries({}, optional=keys)


TREES = st.fixed_dictionaries(
    {},
    optional={
        "match": section(device=NAME, memory_total_bytes=SIZE, model=st.just(IDENTITY)),
        "workload": section(name=NAME, sha256=NAME, concurrency=SIZE),
        "limits": section(max_memory_bytes=SIZE, slo_tpot_ms=NUMBER),
        "cache": st.fixed_dictionaries(
            {}, optional={"slots": SIZE | st.just("12.5%"), "policy": st.sampled_from(schema.POLICIES)}
        ),
        "compute": st.fixed_dictionaries({}, optional={"decode": st.sampled_from(schema.DECODE_KERNELS)}),
        "fixed": st.lists(st.sampled_from(["cache.slots", "prefetch", "limits.max_memory_bytes"]), max_size=3),
        "evidence": section(
            memory_model_error=st.floats(allow_nan=False, allow_infinity=False),
            ratio=st.fixed_dictionaries({"estimate": NUMBER, "low": NUMBER, "high": NUMBER}),
        ),
        "provenance": section(
            created=NAME, commit=NAME, command=NAME, hardware=st.dictionaries(NAME, SCALARS, max_size=4)
        ),
    },
)


@settings(max_examples=80, deadline=None)
@given(tree=TREES)
def test_round_trip_is_exact_and_stable(tree: dict[str, Any]) -> None:
    profile = Profile.model_validate({"schema_version": 1, "kind": schema.KIND, **tree})
    text = dump_profile(profile)
    again = Profile.model_validate(strict_yaml.parse(text))
    assert again == profile
    assert dump_profile(again) == text


@pytest.mark.parametrize(
    "name", ["no", "on", "1e3", "0x1F", "017", "1_000", "12:30", "2026-11-22", "~", "", ".5", "=", "25%"]
)
def test_other_yaml_readers_see_the_same_text(name: str) -> None:
    """PyYAML itself reads YAML 1.1; what 1.2 reads as numbers must be quoted as well."""
    line = strict_yaml.dump({"name": name})
    assert yaml.safe_load(line) == {"name": name} == strict_yaml.parse(line)
    assert "'" in line or '"' in line


def test_floats_are_plain() -> None:
    assert strict_yaml.dump({"a": 1e-7, "b": 2e9, "c": 0.1}) == "a: 0.0000001\nb: 2000000000.0\nc: 0.1\n"


def test_saving_keeps_the_order_of_the_schema_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.yaml"
    profile = Profile.default().with_overrides({"workload.name": "chat", "match.device": "cpu"})
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert list(path.parent.iterdir()) == [path]
    keys = list(strict_yaml.parse(path.read_text()))
    assert keys == [name for name in Profile.model_fields if name in keys]
    assert "objectives" not in keys and "evidence" not in keys


def test_overrides_set_dotted_keys_and_make_sections() -> None:
    overrides = parse_overrides(
        ["cache.slots=25%", "limits.max_memory_bytes=1.5GiB", "prefetch.depth=3", "cache.kv_bytes=null"]
    )
    profile = Profile.default().with_overrides(overrides)
    assert profile.cache.slots == "25%" and profile.cache.kv_bytes is None and profile.prefetch.depth == 3
    assert profile.limits is not None and profile.limits.max_memory_bytes == 3 << 29
    assert Profile.default().cache.slots is None, "the original is untouched"


@pytest.mark.parametrize("setting", ["cache.slots", "=3", "a=[1"])
def test_a_setting_that_is_no_setting(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_overrides([setting])


@pytest.mark.parametrize("overrides", ["cache.slots=3", ["cache.slots=3"]])
def test_overrides_that_are_no_mapping(overrides: Any) -> None:
    with pytest.raises(ProfileError, match="a mapping is needed, such as"):
        Profile.default().with_overrides(overrides)


@pytest.mark.parametrize("key", ["cache.slot", "miss.slots", "cachee.slots", "cache.policy.name"])
def test_an_override_of_an_unknown_key(key: str) -> None:
    with pytest.raises(ProfileError, match="nearest known one is"):
        Profile.default().with_overrides({key: 3})


def matched(**changes: Any) -> Profile:
    return Profile.default().with_overrides({"match": {**MATCH, **changes}})


def test_the_same_model_and_machine_match_exactly() -> None:
    assert match_profile(matched(), MODEL, MACHINE) == schema.MatchResult("exact", ())


@pytest.mark.parametrize(
    ("machine", "level", "says"),
    [
        (MachineFacts("cpu", 15_300_000_000, 2e9), "exact", []),
        (MachineFacts("cpu", 15_100_000_000, 2e9), "stale", ["memory", "16.0 GB", "15.1 GB"]),
        (MachineFacts("cpu", 32_000_000_000, 2e9), "compatible", ["memory", "32.0 GB"]),
        (MachineFacts("cpu", 16_000_000_000, 1.4e9), "stale", ["1.50 GB/s", "1.40 GB/s"]),
        (MachineFacts("cpu", 16_000_000_000, None), "exact", ["not measured"]),
        (MachineFacts("cuda:H100", 1_000, 2e9), "rejected", ["device", "cpu", "cuda:H100"]),
    ],
)
def test_machines_that_differ(machine: MachineFacts, level: str, says: list[str]) -> None:
    result = match_profile(matched(), MODEL, machine)
    assert result.level == level
    assert all(word in " ".join(result.reasons) for word in says) and bool(result.reasons) == bool(says)


def test_memory_and_rate_of_another_kind_of_device_are_no_reasons() -> None:
    result = match_profile(matched(), MODEL, MachineFacts("cuda:H100", 1_000, None))
    assert result.reasons == ("device: profile cpu, here cuda:H100",)
    other = match_profile(matched(device="cuda:H200"), MODEL, MachineFacts("cuda:H100", 1_000, None))
    assert other.level == "stale" and len(other.reasons) == 3


def test_every_difference_of_the_model_is_a_reason() -> None:
    other = MODEL.model_copy(update={"experts": 64, "dtype": "float32"})
    result = match_profile(matched(), other, MACHINE)
    assert result.level == "rejected"
    assert [reason.split(":")[0] for reason in result.reasons] == ["model experts", "model dtype"]
    assert "32" in result.reasons[0] and "64" in result.reasons[0]


def test_minor_versions_and_the_age_are_reasons_to_measure_again() -> None:
    told = {"provenance.versions": {"torch": "2.12.1", "transformers": "5.17.0", "numba": "0.1"}}
    here = MachineFacts("cpu", 16_000_000_000, 2e9, {"torch": "2.13.0+cpu", "transformers": "5.17.3", "numba": "0.9"})
    result = match_profile(matched().with_overrides(told), MODEL, here)
    assert result.level == "compatible" and len(result.reasons) == 1
    assert "measured with torch 2.12.1, here 2.13.0+cpu" in result.reasons[0] and "harness.check" in result.reasons[0]
    now = datetime(2026, 11, 1, tzinfo=UTC)
    for created, reasons in (("2026-08-03T00:00:00+00:00", 0), ("2026-08-02", 1), ("2027-01-01", 0), ("once", 0)):
        aged = matched().with_overrides({"provenance.created": created})
        result = match_profile(aged, MODEL, MACHINE, now)
        assert (result.level, len(result.reasons)) == ("compatible" if reasons else "exact", reasons)


def test_overrides_leave_what_they_were_made_of_as_it_was() -> None:
    given: dict[str, Any] = {"limits": {"slo_tpot_ms": 5.0}, "limits.slo_ttft_ms": 6.0}
    assert Profile.default().with_overrides(given).limits is not None
    assert given == {"limits": {"slo_tpot_ms": 5.0}, "limits.slo_ttft_ms": 6.0}


def test_another_name_of_the_same_kind_of_device_is_compatible() -> None:
    machine = MachineFacts("cuda:NVIDIA H100 80GB HBM3", 16_000_000_000, 2e9)
    assert match_profile(matched(device="cuda:NVIDIA H100"), MODEL, machine).level == "compatible"


@pytest.mark.parametrize("match", [None, {}, {"device": "cpu"}])
def test_a_profile_that_does_not_say_is_compatible(match: dict[str, Any] | None) -> None:
    result = match_profile(Profile.default().with_overrides({"match": match}), MODEL, MACHINE)
    assert result.level == "compatible"
    assert "does not say" in result.reasons[0]


def test_the_policies_are_those_that_exist() -> None:
    from runtime.cache.policies import POLICIES

    assert set(schema.POLICIES) == set(POLICIES)


def test_the_kernels_are_those_that_exist() -> None:
    from runtime.kernels import KERNELS

    assert set(schema.DECODE_KERNELS) | set(schema.PREFILL_KERNELS) == set(KERNELS)
