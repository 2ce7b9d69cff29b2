"""Rates of benchmarks: kept with each result and shown at the end. Recorded, never asserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest

RATES = pytest.StashKey[list[str]]()


class Rate(Protocol):
    """`rate("layer_events", 120_000, run)` measures `run`, which does that many of them, and returns what it returns.

    The rate is that of the median round; where benchmarks are disabled, `run` runs once. `setup`, where given, runs
    unmeasured before each round and returns the arguments of `run`. `warmup_rounds` come before all that is measured.
    """

    def __call__(
        self,
        of: str,
        count: int,
        run: Callable[..., Any],
        setup: Callable[[], tuple[Any, ...]] | None = None,
        warmup_rounds: int = 1,
    ) -> Any: ...


@pytest.fixture
def rate(benchmark: Any, request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Rate:
    """See `Rate`."""

    def measure(
        of: str,
        count: int,
        run: Callable[..., Any],
        setup: Callable[[], tuple[Any, ...]] | None = None,
        warmup_rounds: int = 1,
    ) -> Any:
        benchmark.extra_info.update(of=of, count=count)
        prepare = None if setup is None else lambda: (setup(), {})
        result = benchmark.pedantic(run, rounds=5, warmup_rounds=warmup_rounds, setup=prepare)
        if benchmark.stats is not None:
            per_s = count / benchmark.stats.stats.median
            benchmark.extra_info[f"{of}_per_s"] = per_s
            pytestconfig.stash.setdefault(RATES, []).append(f"{per_s:14,.0f} {of}/s  {request.node.name}")
        return result

    return measure


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "paired: compared by `python -m harness.check --base REF`; about 0.3 s a run")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(RATES, []):
        terminalreporter.write_line(line)
