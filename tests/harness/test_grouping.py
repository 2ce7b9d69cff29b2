"""What batches need on a trace: planted kinds of requests are told apart by who is told of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import batching
from harness.measure.grouping import Knowledge, ScheduledPasses
from runtime.errors import UsageError
from runtime.schedulers.base import Scheduler
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.route_overlap import RouteOverlap
from runtime.trace import RoutingTrace, write_trace
from runtime.vocabulary import Phase

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 16, 3, 12


def _trace(kinds: int = 2, requests: int = 8, *, alternate: bool = False) -> RoutingTrace:
    """Requests of several kinds, each with four experts of its own per layer; a prompt token before the decoded ones.

    `alternate`: all are of another kind with every token.
    """
    generator = np.random.default_rng(0)
    experts = np.zeros((requests, TOKENS + 1, LAYERS, TOP_K), np.uint16)
    for request in range(requests):
        for token in range(TOKENS + 1):
            kind = (request + token * alternate) % kinds
            for layer in range(LAYERS):
                experts[request, token, layer] = 4 * kind + generator.choice(4, TOP_K, replace=False)
    phase = np.tile(np.array([Phase.PREFILL] + [Phase.DECODE] * TOKENS, np.uint8), requests)
    of = np.repeat(np.arange(requests, dtype=np.int32), TOKENS + 1)
    return RoutingTrace(
        experts.reshape(-1, LAYERS, TOP_K), of, {"num_experts": EXPERTS, "model": "planted"}, phase=phase
    )


def _distinct(trace: RoutingTrace, scheduler: Scheduler, knows: Knowledge) -> float:
    return ScheduledPasses(trace, scheduler, knows, 10**6).distinct_experts


def test_passes_hold_every_decoded_token_once_and_in_order() -> None:
    trace = _trace()
    passes = ScheduledPasses(trace, RouteOverlap(2, 2, 3), "recent", 10**6).passes
    rows = np.concatenate(passes)
    assert len(set(rows.tolist())) == len(rows) and max(map(len, passes)) == 2
    for request in range(8):
        own = rows[trace.request[rows] == request]
        assert (np.diff(own) == 1).all() and trace.phase is not None and (trace.phase[own] == Phase.DECODE).all()
    assert len(rows) >= 5 * (TOKENS - 1)  # the loop ends when fewer than four are left


def test_it_stops_after_enough_tokens() -> None:
    assert 20 <= ScheduledPasses(_trace(), Fifo(2, 2), "none", 20).num_tokens < 22


def test_distinct_experts_are_those_of_the_rows() -> None:
    trace = _trace()
    found = ScheduledPasses(trace, Fifo(2, 2), "none", 10**6)
    counts = [len(np.unique(trace.experts[rows, layer])) for rows in found.passes for layer in range(LAYERS)]
    assert found.distinct_experts == pytest.approx(np.mean(counts))
    assert found.batch == pytest.approx(np.mean([len(rows) for rows in found.passes]))


@pytest.mark.parametrize("alternate", [False, True])
def test_who_knows_routes_groups_by_kind(alternate: bool) -> None:
    trace = _trace(kinds=4, requests=48, alternate=alternate)
    floor = _distinct(trace, Fifo(2, 4), "none")
    known = {knows: _distinct(trace, RouteOverlap(2, 4, 1), knows) for knows in ("none", "last", "recent", "next")}
    assert known["none"] == floor
    assert known["next"] < 0.9 * floor
    # All change their kind at once: the last token's still says who is of one kind, what was used most no longer does.
    assert known["last"] < 0.9 * floor
    assert (known["recent"] < 0.9 * floor) != alternate


def test_a_trace_with_too_few_requests_is_refused() -> None:
    with pytest.raises(UsageError, match="8 requests of 2 decoded tokens or more, 12 are to be outstanding"):
        ScheduledPasses(_trace(), Fifo(4, 3), "none", 10)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    write_trace(tmp_path / "planted.npz", _trace())
    return tmp_path / "planted.npz"


def test_the_command_writes_what_it_prints(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--trace", str(trace_file), "--shape", "2x2,4x1", "--out", str(out)]
    assert batching.main(["count", *options]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(row["scheduler"], row["quantum"], row["knows"]) for row in rows] == [
        ("fifo", None, "none"),
        *(("route_overlap", 1, knows) for knows in ("last", "recent", "next")),
        *(("route_overlap", 8, knows) for knows in ("none", "last", "recent", "next")),
        ("fifo", None, "none"),
    ]
    assert sum("route_overlap" in line for line in table) == 7
    (file,) = out.iterdir()
    written = json.loads(file.read_text())
    assert written["complete"] and written["rows"] == rows and written["trace"] == "planted.npz"
    assert written["machine"]["cores"] >= 1 and written["command"].startswith("python -m harness.batching")


def test_counting_needs_no_torch(trace_file: Path, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None; from harness.batching import main; "
        f"sys.exit(main(['count', '--trace', {str(trace_file)!r}, '--shape', '2x2', '--out', {str(tmp_path)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["count", "--trace", "missing.npz"], "missing.npz: cannot read the trace"),
        (["count", "--trace", "FILE", "--shape", "4"], "--shape '4' is not GROUPxWINDOW"),
        (["count", "--trace", "FILE", "--shape", "0x2"], "--shape '0x2' is not GROUPxWINDOW"),
        (["count", "--trace", "FILE", "--quantum", "0"], "--quantum '0' is not whole numbers"),
        (["count", "--trace", "FILE", "--slots", "200%"], "--slots '200%' is neither a share"),
        (["count", "--trace", "FILE", "--max-tokens", "0"], "--max-tokens 0: at least 1"),
        (["overlap", "--blocks", "0"], "--blocks 0: at least 1"),
        (["overlap", "--tokens", "1"], "--tokens 1: at least 2"),
        (["overlap", "--shape", "x"], "--shape 'x' is not"),
        (["deadline", "--shape", "2x2,4x2"], "--shape: one GROUPxWINDOW, not 2"),
        (["deadline", "--slo-factors", "fast"], "--slo-factors 'fast' is not numbers above 0"),
        (["deadline", "--load", "0"], "--load 0: a share"),
        (["memory", "--above", "-2"], "--above '-2' is not whole numbers"),
    ],
)
def test_wrong_arguments(
    trace_file: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batching.main([str(trace_file) if argument == "FILE" else argument for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and reason in line
