"""The bench: limits, contenders that do not fit, interleaving, the table, the JSON, and all of it once for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import Arena, FakeProcess

from harness import bench
from harness.demo.widen import bundled_model
from harness.measure import bench_report as report
from harness.measure import contest as contests
from harness.measure.baselines import decoder_layers, disk_device_map, experts_modules
from harness.measure.blocks import PROBE_TOKENS, Row, agreement, block_order, paired, run_blocks, warm_up
from harness.measure.cgroup import unavailable_reason
from harness.measure.contest import Contest, Field, measure_process_bytes
from harness.measure.limits import MARGIN_BYTES, Limit, ModelBytes, make_limit, smallest_working
from harness.measure.memory_check import MemoryCheck
from harness.measure.process import ContenderFailed, Spec, start
from harness.measure.workload import TokenRequest
from runtime.errors import BudgetError, UsageError
from runtime.facts import ModelFacts
from runtime.model import meta_model
from runtime.profile import ModelIdentity

MIB = 1 << 20
SIZES = ModelBytes(dense_bytes=10 * MIB, slot_bytes=MIB, num_experts=100)
REQUEST = TokenRequest("r", "t", (1, 2, 3), tuple(range(20)))


def test_the_tight_limit_has_room_for_exactly_its_slots() -> None:
    limit = make_limit("tight", SIZES, process_bytes=50 * MIB, tight_slots=SIZES.slots_of("25%"))
    assert limit.num_slots == 25
    assert limit.total_bytes == (50 + 10 + 25) * MIB + MARGIN_BYTES


def test_the_half_limit_is_half_the_model_and_the_process_filled_with_slots() -> None:
    sizes = ModelBytes(10 * MIB, MIB, 400)
    limit = make_limit("half", sizes, process_bytes=50 * MIB, tight_slots=1)
    assert limit.total_bytes == 205 * MIB + 50 * MIB
    assert limit.num_slots == 205 - 10 - MARGIN_BYTES // MIB


def test_a_given_limit_is_filled_but_never_beyond_all_experts() -> None:
    assert make_limit(1 << 40, SIZES, 50 * MIB, 1).num_slots == 100


def test_a_limit_below_one_expert_names_the_smallest_that_works() -> None:
    with pytest.raises(BudgetError, match=rf"--limit {61 * MIB + MARGIN_BYTES} or more"):
        make_limit(10 * MIB, SIZES, 50 * MIB, 1)


@pytest.mark.parametrize(("share", "slots"), [("25%", 25), ("64", 64), ("0.1%", 1), ("1000", 100)])
def test_slots_are_a_count_or_a_share(share: str, slots: int) -> None:
    assert SIZES.slots_of(share) == slots


def test_slots_of_anything_else_are_refused() -> None:
    with pytest.raises(UsageError, match="'many' is neither"):
        SIZES.slots_of("many")


def test_the_smallest_working_limit_is_bisected_in_few_tries() -> None:
    tried: list[int] = []

    def works(limit: int) -> bool:
        tried.append(limit)
        return limit >= 700

    found = smallest_working(works, 100, 1000)
    assert found is not None and 700 <= found <= 760 and len(tried) <= 5


def test_a_contender_that_never_works_has_no_smallest_limit() -> None:
    assert smallest_working(lambda limit: False, 100, 1000) is None


def _contest(tmp_path: Path, **changes: Any) -> Contest:
    known = {
        "model": "m", "profile": None, "threads": 1, "sizes": SIZES, "top_k": 4, "num_pools": 1, "context": 23,
        "use_cgroup": True, "warm_request": REQUEST, "num_tokens": 20, "cap_s": 10.0, "fused": "f", "files": (),
        "scratch": tmp_path, "say": lambda text: None,
    }  # fmt: skip
    return Contest(**{**known, **changes})


LIMIT = Limit("tight", total_bytes=500, process_bytes=50, num_slots=64)


def _field(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs: Any, speed: Any = lambda spec: 10.0
) -> tuple[Arena, Field]:
    arena = Arena(needs, speed)
    monkeypatch.setattr(contests.processes, "start", arena.start)
    return arena, Field(_contest(tmp_path), LIMIT)


def test_ours_takes_fewer_slots_until_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arena, running = _field(monkeypatch, tmp_path, lambda spec: 9 * spec.overrides["cache.slots"])
    running.add("ours")
    assert running.rows["ours"].failure is None and running.rows["ours"].process.facts["slots"] == 54
    running.close()
    assert not arena.running


def test_what_does_not_fit_says_so_with_its_smallest_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arena, running = _field(monkeypatch, tmp_path, lambda spec: SIZES.total_bytes // 2)
    running.add("accelerate_layers")
    row = running.rows["accelerate_layers"]
    assert not row.fits and SIZES.total_bytes // 2 <= row.smallest_bytes < 0.6 * SIZES.total_bytes
    assert not arena.running


def test_the_faster_implementation_stays_and_the_other_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speeds = {"eager": 5.0, "grouped_mm": 2.0}
    arena, running = _field(monkeypatch, tmp_path, lambda spec: 0, lambda spec: speeds[spec.implementation])
    running.add("accelerate_experts")
    assert running.rows["accelerate_experts"].implementation == "eager"
    assert [spec.implementation for spec in arena.running] == ["eager"]
    running.close()
    assert not arena.running


def test_one_implementation_that_fits_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, running = _field(monkeypatch, tmp_path, lambda spec: 1000 if spec.implementation == "eager" else 0)
    running.add("accelerate_experts")
    assert running.rows["accelerate_experts"].implementation == "grouped_mm"


def test_resident_models_have_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arena, running = _field(monkeypatch, tmp_path, lambda spec: 10**9)
    running.add("resident")
    running.add("reference")
    assert arena.limits_tried == [None, None]


def test_on_demand_keeps_nothing(tmp_path: Path) -> None:
    spec = _contest(tmp_path).on_demand_spec()
    assert spec.overrides["cache.slots"] == 4 and spec.overrides["prefetch.depth"] == 0


def test_lru_has_the_slots_of_ours_and_their_waiting_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena, running = _field(monkeypatch, tmp_path, lambda spec: 9 * spec.overrides["cache.slots"])
    for name in ("ours", "lru", "lru_prefetch"):
        running.add(name)
    ours, on_demand, prefetching = (spec.overrides for spec in arena.running)
    assert ours["cache.slots"] == on_demand["cache.slots"] == prefetching["cache.slots"] == 54
    assert "cache.policy" not in ours and on_demand["cache.policy"] == prefetching["cache.policy"] == "lru"
    assert on_demand["prefetch.depth"] == 0 and "prefetch.depth" not in prefetching
    for name, stall_s in (("ours", 0.5), ("lru", 1.0), ("lru_prefetch", 0.0)):
        running.rows[name].samples = {
            block: {"decode_tokens": 10, "decode_s": 2.0, "stats": {"stall_s": stall_s * (1 + block)}}
            for block in range(3)
        }
    lru = running.rows["lru"]
    assert lru.stall_s() == pytest.approx(0.2)
    assert report._stall_ratio(running.rows, lru).estimate == pytest.approx(0.5)
    assert report._stall_ratio(running.rows, running.rows["lru_prefetch"]) is None


def test_the_process_is_its_peak_less_weights_and_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contests.processes, "start", Arena(lambda spec: 0, lambda spec: 10.0).start)
    sizes = ModelBytes(dense_bytes=300, slot_bytes=20, num_experts=8)
    assert measure_process_bytes(_contest(tmp_path, sizes=sizes)) == 1001 - 300 - 20


def test_a_slow_contender_decodes_fewer_tokens() -> None:
    fast, slow = Row("a", FakeProcess(10.0)), Row("b", FakeProcess(1.0))
    for row in (fast, slow):
        warm_up(row, REQUEST, 20, cap_s=8.0)
    assert (fast.num_tokens, slow.num_tokens) == (20, 8)
    crawling = Row("c", FakeProcess(0.01))
    warm_up(crawling, REQUEST, 20, cap_s=8.0)
    assert crawling.num_tokens == PROBE_TOKENS


def test_two_blocks_are_an_abba_and_the_start_rotates() -> None:
    rows = [Row(name, None) for name in "abc"]
    orders = ["".join(row.name for row in block_order(rows, block)) for block in range(4)]
    assert orders == ["abc", "cba", "bca", "acb"]


def _measured(rows: list[Row], num_blocks: int = 3) -> dict[str, Row]:
    for row in rows:
        row.wanted_tokens = row.num_tokens = 20
    run_blocks(rows, [REQUEST] * num_blocks, [], cap_s=1e9, on_sample=lambda row: None, on_block=lambda: None)
    return {row.name: row for row in rows}


def test_every_contender_is_measured_in_every_block_and_ours_replays_its_loads() -> None:
    ours = FakeProcess(8.0, slots=2)
    rows = _measured([Row("ours", ours), Row("reference", FakeProcess(10.0))])
    assert [sorted(row.samples) for row in rows.values()] == [[0, 1, 2]] * 2
    assert ours.asked == ["run", "replay_loads"] * 3


def test_a_contender_that_dies_is_left_out_and_the_others_go_on() -> None:
    rows = _measured([Row("a", FakeProcess(8.0, dies_at=1)), Row("b", FakeProcess(8.0))])
    assert rows["a"].failure == "block 1: killed by the kernel: out of memory" and not rows["a"].fits
    assert not rows["a"].is_measured and len(rows["b"].samples) == 3


def test_a_row_that_takes_too_long_decodes_less_from_then_on() -> None:
    row = Row("a", FakeProcess(1.0), wanted_tokens=20, num_tokens=20)
    run_blocks([row], [REQUEST] * 2, [], cap_s=9.5, on_sample=lambda row: None, on_block=lambda: None)
    assert [sample["decode_tokens"] for sample in row.samples.values()] == [19, 8]


def test_tokens_are_compared_as_far_as_both_decoded() -> None:
    rows = _measured([Row("a", FakeProcess(1.0)), Row("b", FakeProcess(1.0, prediction=8))], num_blocks=1)
    rows["b"].samples[0]["predicted_ids"] = [7, 7, 8]
    assert agreement(rows["b"], rows["a"]) == (2, 3)
    assert paired({0: 2.0}, {1: 1.0}) is None


FACTS = ModelFacts(
    identity=ModelIdentity(architecture="M", layers=2, experts=2, top_k=2, expert_bytes=10, dtype="bfloat16"),
    config=None, num_experts_total=4, num_pools=1, top_k=2, expert_bytes=10, slot_bytes=10, dense_bytes=20, dtype=None,
)  # fmt: skip


@pytest.fixture
def rows() -> dict[str, Row]:
    """Ours at 8 tokens/s, accelerate at 2, the reference at 10, and layers that do not fit."""
    accelerate = Row("accelerate_experts", FakeProcess(2.0), implementation="eager")
    rows = _measured([Row("ours", FakeProcess(8.0, slots=2)), accelerate, Row("reference", FakeProcess(10.0))])
    layers = Row("accelerate_layers", None, failure="killed", fits=False, smallest_bytes=4321)
    return {**rows, "accelerate_layers": layers}


def test_the_table_has_a_line_per_contender(rows: dict[str, Row]) -> None:
    lines = report.table(rows, page_cache_limited=False, dense_share=0.0).splitlines()
    assert "8.00 [8.00, 8.00]" in lines[1] and "75.0%" in lines[1] and "60 of 60" in lines[1]
    assert "4.00 [4.00, 4.00]" in lines[2] and "100 B" in lines[2]
    assert "does not fit: killed; the smallest limit that was seen to work: 4321" in lines[4]
    notes = "\n".join(lines[5:])
    assert "ours: page cache not limited" in notes and "our kernels: page cache" not in notes
    assert "experts implementation eager" in notes
    assert "ours: waited for experts 42% of the time" in notes  # 1 s of 19 tokens at 8 tokens/s


def test_cached_pages_beyond_the_dense_weights_are_told(rows: dict[str, Row]) -> None:
    rows["ours"].samples[1]["cached_before"] = 0.05
    assert "up to 5.0%" in report.table(rows, page_cache_limited=True, dense_share=0.02)
    assert "up to" not in report.table(rows, page_cache_limited=True, dense_share=0.045)


def test_the_json_has_every_contender_and_null_for_what_was_not_measured(rows: dict[str, Row]) -> None:
    summary = json.loads(json.dumps(report.summary(rows, report.ladder(rows, FACTS, 1e3))))
    for name in ("ours", "accelerate_experts"):
        assert {"tokens_per_s", "peak_memory_bytes", "bytes_per_token", "hit_rate"} <= summary[name].keys()
    assert summary["accelerate_layers"] is summary["resident"] is summary["on_demand"] is None
    assert summary["smallest_working_limit_bytes"] == {"accelerate_layers": 4321}
    assert summary["tokens_equal"] is True and summary["attainable_tokens_per_s"] == pytest.approx(10.0)


def test_one_different_token_is_not_equal(rows: dict[str, Row]) -> None:
    rows["ours"].samples[2]["predicted_ids"][3] = 0
    assert report.tokens_equal(rows) is False


def test_without_a_reference_equality_and_ladder_are_unknown(rows: dict[str, Row]) -> None:
    del rows["reference"]
    assert report.tokens_equal(rows) is None and report.ladder(rows, FACTS, 1e3) is None


def test_the_ladder_follows_from_the_samples(rows: dict[str, Row]) -> None:
    # Per block: 19 tokens, 4 loads of 10 bytes replayed in 0.5 s; resident 10 tokens/s; memory (20 + 2*2*10)/1e3 s.
    found = report.ladder(rows, FACTS, memory_bytes_per_s=1e3)
    assert found is not None
    assert found.attainable == pytest.approx(10.0) and found.fraction.estimate == pytest.approx(0.8)
    assert found.bound_own == pytest.approx(1 / max(0.06, 4 / 19 * 10 / 80))
    assert found.bound_oracle == pytest.approx(1 / 0.06)  # two layer steps, two slots: two misses


def test_a_replay_slower_than_the_resident_model_is_what_is_attainable(rows: dict[str, Row]) -> None:
    for sample in rows["ours"].samples.values():
        sample["replay_s"] = 3.8
    assert report.attainable_rates(rows) == pytest.approx({0: 5.0, 1: 5.0, 2: 5.0})


def test_a_run_whose_transfer_was_faster_than_the_replay_counts_instead(rows: dict[str, Row]) -> None:
    for sample in rows["ours"].samples.values():
        sample |= {"replay_s": 100.0, "stats": {**sample["stats"], "busy_s": 7.6, "num_loads": 8}}
    assert report.attainable_rates(rows) == pytest.approx({0: 5.0, 1: 5.0, 2: 5.0})  # half of the loads were needed


def test_a_model_with_several_pools_has_no_ladder(rows: dict[str, Row]) -> None:
    for sample in rows["ours"].samples.values():
        sample["replay_s"] = None
    assert report.ladder(rows, FACTS, 1e3) is None


@pytest.mark.parametrize(("peak", "verdict"), [(500_000_300, "PASS"), (500_000_301, "OVER")])
def test_the_memory_verdict(peak: int, verdict: str) -> None:
    check = MemoryCheck(peak, dense_bytes=100, num_slots=4, slot_bytes=50)
    assert check.describe().startswith(verdict) and check.as_dict()["passed"] is (verdict == "PASS")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--contenders", "ours,vllm"], "unknown contender 'vllm'"),
        (["--tokens", "1"], "--tokens 1 is too few"),
        (["--slots", "some"], "'some' is neither"),
        (["--model", "/nowhere/at/all"], "no checkpoint at"),
        (["--profile", "/nowhere.yaml"], "cannot read the profile"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", str(bundled_model())]
    assert bench.main([*arguments, *model]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_the_device_map_leaves_experts_or_layers_on_disk() -> None:
    model = meta_model(str(bundled_model())).model
    experts, layers = list(experts_modules(model)), decoder_layers(model)
    assert experts == [f"{layer}.mlp.experts" for layer in layers]
    for on_disk in (experts, layers):
        device_map = disk_device_map(model, on_disk)
        assert {name for name, device in device_map.items() if device == "disk"} == set(on_disk)
        dense = [name for name, _ in model.named_parameters() if not any(name.startswith(f"{d}.") for d in on_disk)]
        assert all(any(f"{name}.".startswith(f"{entry}.") for entry in device_map) for name in dense)


# Processes, for real.

REASON = unavailable_reason()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup can be made here: {REASON}")


@needs_cgroup
def test_a_contender_without_room_for_torch_is_told_as_out_of_memory() -> None:
    spec = Spec("resident", str(bundled_model()), threads=1)
    with (
        pytest.raises(ContenderFailed, match="out of memory") as told,
        start("t", spec, limit_bytes=24 * MIB, use_cgroup=True),
    ):
        pass
    assert told.value.out_of_memory


@pytest.mark.slow
def test_an_engine_contender_counts_its_decode_and_replays_its_loads() -> None:
    spec = Spec("engine", str(bundled_model()), 1, overrides={"cache.slots": 16, "compute.threads": 1})
    with start("t", spec, limit_bytes=None, use_cgroup=False) as process:
        assert process.facts["slots"] == 16 and process.peak_bytes is None
        answer = process.ask("run", timeout_s=60.0, prompt_ids=[5, 6, 7], output_ids=[8, 9, 10, 11])
        assert answer["decode_tokens"] == 3 and answer["decode_s"] > 0 and len(answer["predicted_ids"]) == 4
        assert answer["stats"]["num_tokens"] == 3 and answer["needed_loads"] > 0
        assert process.ask("replay_loads", timeout_s=60.0)["replay_s"] > 0
        with pytest.raises(ContenderFailed, match="AttributeError"):
            process.ask("no_such_op", timeout_s=60.0)
        with pytest.raises(ContenderFailed, match="no answer within"):
            process.ask("run", timeout_s=0.0, prompt_ids=[5], output_ids=[8])


@pytest.mark.slow
def test_the_whole_bench(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [
        *(sys.executable, "-m", "harness.bench", "--model", str(bundled_model()), "--out", str(tmp_path)),
        *("--blocks", "2", "--tokens", "6", "--prompt-tokens", "8", "--limit", "tight"),
    ]
    environment = {**os.environ, "EXPERTFLOW_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["tokens_equal"] is True
    for name in ("ours", "resident", "accelerate_experts", "accelerate_layers", "on_demand"):
        assert summary[name]["tokens_per_s"] > 0
    assert summary["on_demand"]["hit_rate"] == 0 < summary["ours"]["hit_rate"]
    assert "fraction of attainable" in done.stdout and "bound with oracle misses" in done.stdout
    (raw,) = tmp_path.glob("*-tight.json")
    kept = json.loads(raw.read_text())
    assert kept["complete"] and all(len(row["samples"]) == 2 for row in kept["contenders"].values())
    if REASON is None:
        limited = ("ours", "accelerate_experts", "accelerate_layers", "on_demand")
        assert all(summary[name]["peak_memory_bytes"] <= summary["limit_bytes"] for name in limited)
