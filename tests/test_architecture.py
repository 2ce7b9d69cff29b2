"""The import rules of the design, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("runtime", "harness") for path in (ROOT / package).rglob("*.py"))
DECISION = (
    "runtime.vocabulary",
    "runtime.cache.coordinator",
    "runtime.cache.governor",
    "runtime.cache.miss",
    "runtime.cache.policies",
    "runtime.cache.prefetch",
    "runtime.cache.residency",
    "runtime.cache.steps",
    "runtime.cache.streaming",
    "runtime.cache.timeline",
    "runtime.predictors.activation_matrix",
    "runtime.predictors.artifact",
    "runtime.predictors.base",
    "runtime.predictors.expert_frequencies",
    "runtime.predictors.make",
    "runtime.predictors.params",
    "runtime.predictors.periodic",
    "runtime.predictors.previous_token",
    "runtime.predictors.sequence",
    "runtime.schedulers.base",
    "runtime.schedulers.deadline",
    "runtime.schedulers.estimates",
    "runtime.schedulers.fifo",
    "runtime.schedulers.partition",
    "runtime.schedulers.route_overlap",
    "runtime.tasks",
    "runtime.transfer.base",
    "runtime.transfer.queue",
    "runtime.transfer.simulated",
    "runtime.trace",
    "runtime.telemetry",
)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import_time` only those outside functions and TYPE_CHECKING blocks."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        stack.extend(ast.iter_child_nodes(node))
    return found


def _importers(package: str) -> list[str]:
    return [_module(p) for p in SOURCES if any(name.split(".")[0] == package for name in _imports(p))]


def test_runtime_never_imports_harness() -> None:
    assert [module for module in _importers("harness") if module.startswith("runtime")] == []


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("optuna", ["harness.search.study"]),
        ("pynvml", ["runtime.nvml"]),
    ],
)
def test_nobody_else_imports(package: str, importers: list[str]) -> None:
    assert _importers(package) == importers


@pytest.mark.parametrize("module", DECISION)
def test_decision_modules_import_no_model_and_no_clock(module: str) -> None:
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    forbidden = {"torch", "transformers", "time", "datetime"}
    assert {name.split(".")[0] for name in _imports(path)} & forbidden == set()


def test_decision_modules_work_where_torch_is_not_installed() -> None:
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(DECISION)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_commands_start_without_torch() -> None:
    """It is imported within `cli_main`, for seconds: Ctrl-C meanwhile is one word, and --help does not wait."""
    commands = [name for path in sorted((ROOT / "harness").glob("[a-z]*.py")) for name in [_module(path)]]
    commands += ["harness.demo.__main__", "runtime.generate", "runtime.profile.__main__"]
    code = f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import {', '.join(commands)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_import_cycles() -> None:
    modules = {_module(path): path for path in SOURCES}
    graph = {name: _imports(path, at_import_time=True) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                if not name.startswith(f"{other}."):  # a package's __init__ is imported before its modules
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
