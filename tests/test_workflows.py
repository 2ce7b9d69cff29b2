"""The workflows: valid, least privileged, and what they call exists and takes the options that it is given."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import check

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
SCRIPT = FOLDER / "check.sh"


def _read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in _read(path)["jobs"].values() for step in job["steps"]]


def _commands() -> list[list[str]]:
    """Every simple command of every `run`, as words; expressions and variables are words like others."""
    found = []
    for path in FILES:
        for step in _steps(path):
            text = re.sub(r"\\\n", " ", step.get("run", ""))
            for line in text.splitlines():
                words = shlex.split(line)
                found.append(words)
    return found


def _check_calls() -> list[list[str]]:
    """Arguments of every call of `harness.check`, those of the script among them."""
    script = next(line for line in re.sub(r"\\\n", " ", SCRIPT.read_text()).splitlines() if line.startswith("python "))
    added = [word for word in shlex.split(script.partition(" > ")[0])[3:] if word != "$@"]
    calls = []
    for words in _commands():
        if words[:3] == ["python", "-m", "harness.check"]:
            calls.append(words[3:])
        elif words[:2] == ["bash", ".github/workflows/check.sh"]:
            calls.append([*words[3:], *added])
    return calls


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_they_are_valid(schema: str) -> None:
    assert {path.name for path in FILES} == {"tests.yml", "counters.yml", "paired.yml"}
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, FILES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_would_find_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(FILES[0].read_text().replace("runs-on:", "run-on:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(broken)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_may_only_read_need_no_secret_and_are_pinned(path: Path) -> None:
    workflow, text = _read(path), path.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text and "pull_request_target" not in text
    assert all("permissions" not in job for job in workflow["jobs"].values())
    assert "concurrency" in workflow or all("concurrency" in job for job in workflow["jobs"].values())
    for step in _steps(path):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+(/[a-z]+)?@v\d+", step["uses"])
        # What others may write reaches a shell as a variable only.
        assert "${{" not in step.get("run", "")
    checkouts = [step for step in _steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_every_pull_request_is_tested_and_gated() -> None:
    for name in ("tests", "counters"):
        on = _read(FOLDER / f"{name}.yml")[True]  # YAML 1.1 reads the key `on` as true
        assert {"push", "pull_request"} <= on.keys() and on["pull_request"] is None
    assert _read(FOLDER / "paired.yml")[True].keys() == {"pull_request", "schedule", "workflow_dispatch"}


def test_a_base_is_compared_with_where_there_is_a_history() -> None:
    for path in FILES:
        if any("--base" in step.get("run", "") for step in _steps(path)):
            (checkout,) = [step for step in _steps(path) if step.get("uses", "").startswith("actions/checkout@")]
            assert checkout["with"]["fetch-depth"] == 0


def test_the_python_versions_are_supported() -> None:
    versions = {
        str(step["with"]["python-version"])
        for path in FILES
        for step in _steps(path)
        if "with" in step and "python-version" in step["with"]
    }
    matrix = _read(FOLDER / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions - {"${{ matrix.python }}"} <= set(matrix)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={min(matrix, key=lambda text: tuple(map(int, text.split("."))))}"' in pyproject


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {words[1] for words in _commands() if words[:1] == ["make"]}
    assert called and called <= targets


def test_every_extra_exists() -> None:
    called = re.findall(r"--editable '\.\[([a-z,]+)\]'", "".join(path.read_text() for path in FOLDER.iterdir()))
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert called
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for names in called for extra in names.split(","))


_COLLECT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
import pytest
options = ["-q", "--collect-only", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "paired"]
sys.exit(pytest.main([*options, "tests/benchmarks"]))
"""


@pytest.mark.slow
def test_the_ci_extra_is_enough_for_the_benchmarks() -> None:
    """A file of the head's that cannot be loaded is a regression: none may need a package of another extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {extra: _distributions(needs) for extra, needs in project["optional-dependencies"].items()}
    absent = set().union(*names.values()) - names["ci"] - _distributions(project["dependencies"])
    modules = [module for module, owners in packages_distributions().items() if absent & _distributions(owners)]
    assert "prometheus_client" in modules
    command = [sys.executable, "-c", _COLLECT, " ".join(modules)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "::test_decode\n" in result.stdout, result.stdout


def _distributions(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[<>=\[]", one)[0].lower().replace("_", "-") for one in requirements}


def test_every_call_of_the_check_is_one_that_it_takes() -> None:
    calls = _check_calls()
    assert {layer for call in calls for layer in ("--base", "--series", "--aa") if layer in call} == {
        "--base", "--series", "--aa",
    }  # fmt: skip
    assert any(not {"--base", "--series", "--profile", "--bless"} & set(call) for call in calls)  # the counters
    for call in calls:
        options = check._parser().parse_args(call)
        check._refuse_what_does_not_belong(options)
        assert options.markdown and options.junit


def test_the_readme_names_every_workflow_and_the_command_that_blesses() -> None:
    text = (FOLDER / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in FILES)
    (command,) = re.findall(r"^python -m harness\.check (--bless [^#\n]*)", text, re.MULTILINE)
    options = check._parser().parse_args(shlex.split(command))
    assert options.bless and options.reason and f"{options.goldens}" in text


def test_the_counters_install_leaves_out_what_only_a_model_needs(tmp_path: Path) -> None:
    """The step itself, with `pip` replaced by nothing."""
    (install,) = [step["run"] for step in _steps(FOLDER / "counters.yml") if "pip install" in step.get("run", "")]
    listing = install.partition("python -m pip")[0]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-c", listing], cwd=tmp_path, env=environment, check=True)
    needs = {re.split(r"[<>=\[]", line)[0] for line in (tmp_path / "counters-needs.txt").read_text().splitlines()}
    assert {"numba", "numpy", "pydantic", "tqdm"} <= needs
    assert not needs & {"torch", "transformers", "optuna", "matplotlib"}


@pytest.mark.parametrize(
    ("code", "ends", "warning"),
    [(0, 0, ""), (1, 1, ""), (2, 2, ""), (3, 0, "too noisy"), (4, 0, "nothing could be measured")],
)
def test_undecided_is_a_warning_and_a_regression_fails(tmp_path: Path, code: int, ends: int, warning: str) -> None:
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": "a summary.md"}
    command = ["bash", str(SCRIPT), "aa", "--base", "some ref", "--aa"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == ends, result.stderr
    assert warning in result.stdout and ("::warning title=aa::" in result.stdout) == bool(warning)
    asked = "-m harness.check --base some ref --aa --json --markdown a summary.md --junit checks/aa.xml"
    assert (tmp_path / "checks" / "aa.json").read_text().strip() == asked
