"""The figures of a GPU's systems from samples made up by hand: the ladder, the goals, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.demo.widen import bundled_model
from harness.measure.blocks import Row
from harness.measure.gpu_figures import Known, buffer_figures, derived, entry, goals, prefill_figures, resident_entry
from harness.report.gpu import goal_lines, markdown, system_line
from runtime.errors import UsageError
from runtime.facts import describe

LAYERS, TOP_K, STEPS = 8, 4, 3
# Each layer step takes the same four experts of its layer, but for the last token, which takes four others.
DEMANDS = [[32 * layer + expert + 4 * (step == STEPS - 1) for expert in range(TOP_K)]
           for step in range(STEPS) for layer in range(LAYERS)]  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Known:
    facts = describe(bundled_model())
    return Known(replace(facts, slot_bytes=facts.expert_bytes), 1e12, {0: DEMANDS, 1: DEMANDS}, 2048)


def row(name: str, s_per_token: float, loads: int | None = None, replay_s: float | None = 0.0, slots: int = 64) -> Row:
    sample: dict[str, Any] = {
        "request": "r",
        "decode_s": STEPS * s_per_token,
        "decode_tokens": STEPS,
        "ttft_ms": 9.0,
        "predicted_ids": [1, 2, 3, 4],
    }
    if loads is not None:
        stats = {"num_loads": loads, "num_bytes": 49152 * loads, "num_lookups": 96, "num_hits": 96 - loads}
        sample |= {"stats": {**stats, "busy_s": 10.0, "stall_s": 0.0}, "needed_loads": loads, "replay_s": replay_s}
        sample["slots"] = slots
    return Row(name, None, samples={0: dict(sample), 1: dict(sample)})


def test_the_ladder_goes_down_from_the_oracle_to_what_was_measured(known: Known) -> None:
    found = entry(row("25 %", 0.020, 48, 0.048), row("resident", 0.010), {"slots": 64}, known)
    steps = found["ladder"]
    # All 64 experts that are ever asked for fit, and the oracle starts with the best contents.
    assert [block["oracle_loads"] for block in found["blocks"]] == [0, 0]
    assert steps["bound_oracle"] >= steps["bound_own"] == pytest.approx(1 / 0.016)  # 48 loads of 1 ms, 3 tokens
    assert steps["attainable"] == pytest.approx(1 / 0.016) and steps["measured"] == pytest.approx(50.0)
    assert steps["fraction"]["estimate"] == pytest.approx(0.8) and steps["allowed"] == pytest.approx(100.0)
    assert found["tpot_over_resident"]["estimate"] == pytest.approx(2.0)
    assert found["hit_rate"] == 0.5 and found["bytes_per_token"] == 48 * 49152 / 3
    assert found["equal_tokens"] == found["compared_tokens"] == 8 and "host_us_per_layer_step" not in found


def test_fewer_slots_need_more_loads_by_the_oracle_too(known: Known) -> None:
    loads = [
        entry(row("a", 0.02, 96, 0.1, slots), row("b", 0.01), {"slots": slots}, known)["blocks"][0]["oracle_loads"]
        for slots in (64, 40, 32, 16)
    ]
    assert loads == sorted(loads) and loads[0] == 0 < loads[1] < loads[-1] <= 96


def test_the_hosts_share_is_that_of_runs_without_loads(known: Known) -> None:
    found = entry(row("100 %", 0.0108, 0), row("resident", 0.010), {"slots": 256}, known)
    assert found["host_us_per_layer_step"]["median"] == pytest.approx(100.0)
    assert found["ladder"]["attainable"] == pytest.approx(100.0)


def prefill(seconds: float, replay_s: float | None) -> dict[str, Any]:
    repeat = {"prefill_s": seconds, "num_loads": 200, "num_bytes": 2e9, "needed_loads": 200, "replay_s": replay_s}
    return {"num_tokens": 2048, "repeats": [repeat] * 3, "logits_sha256": "a"}


def test_a_prefill_is_held_against_the_copies_alone() -> None:
    resident = prefill_figures({**prefill(0.03, None)}, None)
    assert resident["seconds"] == 0.03 and "share_of_h2d" not in resident
    found = prefill_figures(prefill(0.05, 0.04), resident)
    assert found["share_of_h2d"]["median"] == pytest.approx(0.8) == found["fraction_of_attainable"]
    assert found["h2d_bytes_per_s"] == pytest.approx(50e9) and found["equals_resident"]


def test_what_a_prefill_loads_in_vain_is_no_bandwidth() -> None:
    taken = prefill(0.05, 0.04)
    taken["repeats"] = [{**one, "num_loads": 250, "num_bytes": 2.5e9} for one in taken["repeats"]]
    found = prefill_figures(taken, None)
    assert found["share_of_h2d"]["median"] == pytest.approx(0.8) and found["flag"] is None
    assert found["link_bytes_per_s"] == pytest.approx(40e9) and found["h2d_bytes_per_s"] == pytest.approx(50e9)


def test_a_fraction_above_one_is_wrong_and_no_goal_met(known: Known) -> None:
    found = systems(known)
    quarter = entry(row("25 %", 0.009, 48, 0.036), row("resident", 0.010), {"slots": 64}, known)
    quarter["prefill"] = prefill_figures(prefill(0.03, 0.04), None)
    found["25 %"] = {**found["25 %"], **quarter}
    wrong = {name for name, status in statuses(found, known).items() if status == "WRONG"}
    assert wrong == {"fraction of attainable at 25 %", "prefill at 25 %, share of the H2D bandwidth"}
    assert system_line("25 %", found["25 %"]).count("WRONG: ") == 2
    notes = [one["note"] for one in goals(found, derived(found, 1)) if one["status"] == "WRONG"]
    assert all("the measurement is wrong" in note for note in notes)


def memory(peak: float) -> dict[str, int]:
    names = ("peak_gpu_bytes", "peak_reserved_gpu_bytes", "held_gpu_bytes", "peak_host_bytes")
    return dict.fromkeys(names, int(peak))


def systems(known: Known, tpot_s: float = 0.0245) -> dict[str, Any]:
    resident = row("resident", 0.010)
    experts = 256 * known.facts.expert_bytes
    planned = known.facts.dense_bytes + experts
    found = {"resident": {**resident_entry(list(resident.samples.values())), "memory": memory(planned + 1e6)}}
    for name, slots, loads, replay_s in (("6.25 %", 16, 80, 0.060), ("25 %", 64, 48, 0.036), ("100 %", 256, 0, 0.0)):
        speed = {"6.25 %": tpot_s, "25 %": 0.0125, "100 %": 0.0107}[name]
        one = entry(row(name, speed, loads, replay_s, slots), resident, {"slots": slots}, known)
        one["memory"] = memory(planned - experts + slots * known.facts.slot_bytes + 1e6)
        one["buffers"] = buffer_figures(one["memory"], slots * known.facts.slot_bytes, known)
        one["prefill"] = prefill_figures(prefill(0.05, 0.048), prefill_figures(prefill(0.03, None), None))
        found[name] = one
    found["accelerate"] = entry(row("accelerate", 0.5), resident, {}, known)
    found["transformers"] = {"error": "CUDA out of memory"}
    return found


def statuses(found: dict[str, Any], known: Known) -> dict[str, str]:
    figures = derived(found, 256 * known.facts.expert_bytes)
    return {one["goal"]: one["status"] for one in goals(found, figures)}


def test_goals_are_met_or_not_or_not_taken(known: Known) -> None:
    found = statuses(systems(known), known)
    assert found.pop("fraction of attainable at 10 %") == found.pop("fraction of attainable at 50 %") == "not taken"
    assert found.pop("prefill at 10 %, share of the H2D bandwidth") == "not taken"
    assert found.pop("prefill at 50 %, share of the H2D bandwidth") == "not taken"
    assert set(found.values()) == {"met"} and len(found) == 9
    slow = statuses(systems(known, tpot_s=0.031), known)
    assert slow["TPOT over resident at 16 slots"] == slow["fraction of attainable at 6.25 %"] == "not met"
    assert set(statuses({}, known).values()) == {"not taken"}


def test_the_ratio_to_another_system_is_of_the_same_requests_whatever_the_gpu_did_meanwhile(known: Known) -> None:
    """Accelerate's visit comes when the GPU is twice as slow, and one request is harder than the other."""
    found = systems(known)
    slow, resident = row("accelerate", 1.0), row("resident", 0.020)
    for one in (slow, resident):
        one.samples[1]["decode_s"] *= 3
    found["accelerate"] = entry(slow, resident, {}, known)
    over = derived(found, 1)["speed_up"]["accelerate"]
    assert over["estimate"] == pytest.approx(1.0 / 0.020 * 0.010 / 0.0125) and over["num_pairs"] == 2
    (goal,) = [one for one in goals(found, derived(found, 1)) if "accelerate" in one["goal"]]
    assert (
        goal["value"] == over["estimate"]
        and goal["note"].startswith("paired by request")
        and "[40, 40]" in goal["note"]
    )
    alone = {**found, "accelerate": entry(slow, None, {}, known)}
    assert derived(alone, 1)["speed_up"] == {}


def test_one_more_slot_of_staging_is_noticed(known: Known) -> None:
    found = systems(known)
    found["6.25 %"]["memory"]["peak_gpu_bytes"] += known.facts.slot_bytes
    assert statuses(found, known)["GPU memory saved at 16 slots, share of the experts"] == "not met"


def test_buffers_are_what_nothing_else_explains(known: Known) -> None:
    slots_bytes = 16 * known.facts.slot_bytes
    found = buffer_figures(memory(known.facts.dense_bytes + slots_bytes + 70e6), slots_bytes, known)
    assert found["peak_bytes"] == 70_000_000 - found["kv_bytes"] and found["kv_bytes"] > 0


def test_the_tables_say_what_was_not_taken(known: Known, tmp_path: Path) -> None:
    found = systems(known)
    figures = derived(found, 256 * known.facts.expert_bytes)
    report = {
        "created": "2026-11-27T01:00:00+00:00",
        "commit": None,
        "shape": {"described": "the demo at the width of wide"},
        "gpu": {"name": "NVIDIA H100", "torch": "2.11.0"},
        "systems": found,
        "derived": figures,
        "goals": goals(found, figures),
        "left_out": ["50 %"],
    }
    (tmp_path / "bench-wide.json").write_text(json.dumps(report))
    text = markdown(tmp_path, ["wide", "narrow"])
    assert (
        "**narrow**: not taken." in text
        and "**gpu-check**: not taken." in text
        and "No time was left for: 50 %" in text
    )
    assert "| transformers | not taken: CUDA out of memory |" in text and "NVIDIA H100" in text
    assert "| fraction of attainable at 25 % | >= 0.8 | 0.96 | met |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") in (4, 5, 7, 11)
    assert "| accelerate | 40.00 [40.00, 40.00] | 2 |" in text and "| 25 % over | tokens/s, times (paired by" in text
    (tmp_path / "check.json").write_text(json.dumps({**report, "steps": [{"name": "tune", "status": "failed"}]}))
    assert "**gpu-check** (2026-11-27, commit unknown): tune failed." in markdown(tmp_path, [])
    for name, one in found.items():
        assert system_line(name, one).startswith(name)
    assert any(line.startswith("not taken fraction of attainable at 10 %") for line in goal_lines(report["goals"]))
    (tmp_path / "bench-broken.json").write_text("{")
    with pytest.raises(UsageError, match=r"bench-broken\.json cannot be read"):
        markdown(tmp_path, [])
