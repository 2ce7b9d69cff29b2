"""Base and head of a comparison, each in a worktree and an environment of its own, gone when the comparison is over.

The head is the working tree as it is, changes that are not committed included: it becomes a commit that no branch
names, through an index of its own. The user's files, index, branches and stash stay as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ExpertFlowError, UsageError

_CODE = ("runtime", "harness", "tests")
"""Folders whose new files belong to the head as well; elsewhere only known files do: others may be huge."""
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "harness.check"), ("EMAIL", "harness.check@localhost"))
}
_NEEDED = ("pytest",)
"""Beside what the project depends on: what runs the benchmarks."""


class EnvironmentFailed(ExpertFlowError):
    """An environment could not be made; nothing can be measured."""


@dataclass(frozen=True)
class Tree:
    """One side of a comparison.

    Attributes:
        name: "base" or "head"; both have four letters: where a process finds its files moves its memory, and its speed.
        commit: as people see it, with "+" where the working tree has changes that are not committed.
        path: its files. python: the interpreter that runs them.
    """

    name: str
    commit: str
    path: Path
    python: str


@contextmanager
def worktrees(root: Path, base: str) -> Iterator[tuple[Tree, Tree, tuple[str, ...]]]:
    """Base and head of the repository at `root`, and notes; both are removed with the block, whatever ends it.

    Raises:
        UsageError: `root` is no git repository, or `base` is not known in it.
        EnvironmentFailed: git could not make a worktree, or packages could not be installed.
    """
    _check_repository(root)
    commits = {"base": _commit_of(root, base)}
    commits["head"], changed = _working_tree(root)
    folder = Path(tempfile.mkdtemp(prefix="expertflow-check-"))
    try:
        for name, commit in commits.items():
            _git(root, "worktree", "add", "--quiet", "--detach", str(folder / name), commit)
        pythons, notes = _environments(folder)
        head = _short(root, "HEAD") + ("+" if changed else "")
        trees = (
            Tree("base", _short(root, commits["base"]), folder / "base", pythons["base"]),
            Tree("head", head, folder / "head", pythons["head"]),
        )
        yield *trees, (*_changes(changed), *notes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(EnvironmentFailed):  # what ended the block says more
            _git(root, "worktree", "prune")


def _changes(changed: int) -> tuple[str, ...]:
    return (f"head is the working tree with {changed} files that are not committed",) if changed else ()


def _check_repository(root: Path) -> None:
    try:
        top = Path(_git(root, "rev-parse", "--show-toplevel"))
    except FileNotFoundError as error:
        raise UsageError("git is not installed, and --base compares two commits: install git") from error
    except EnvironmentFailed as error:
        told = f"--base compares two commits, and {root} has none ({error})"
        raise UsageError(f"{told}; run it in a git clone") from error
    if top.resolve() != root.resolve():
        raise UsageError(f"--base compares two commits of a clone, and {root} is not the top of one: run it there")


def _commit_of(root: Path, ref: str) -> str:
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except EnvironmentFailed as error:
        is_shallow = _git(root, "rev-parse", "--is-shallow-repository") == "true"
        way_out = (
            "this clone is shallow: git fetch --unshallow, or fetch-depth: 0 for actions/checkout"
            if is_shallow
            else "name a branch, a tag or a commit of this clone, after git fetch where it is new"
        )
        raise UsageError(f"--base {ref}: no such commit; {way_out}") from error


def _working_tree(root: Path) -> tuple[str, int]:
    """A commit of the working tree as it is, and how many files differ from HEAD; HEAD itself where none does."""
    head = _commit_of(root, "HEAD")
    own = Path(_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    with tempfile.TemporaryDirectory(prefix="expertflow-index-") as folder:
        index = Path(folder, "index")
        if own.exists():  # what it knows of unchanged files saves reading them
            shutil.copyfile(own, index)
        environment = {"GIT_INDEX_FILE": str(index), **_IDENTITY}
        _git(root, "add", "--update", environment=environment)
        new = [name for name in _CODE if (root / name).exists()]
        _git(root, "add", "--all", "--", *new, environment=environment)
        changed = _git(root, "diff", "--cached", "--name-only", "HEAD", environment=environment).splitlines()
        if not changed:
            return head, 0
        tree = _git(root, "write-tree", environment=environment)
        message = "The working tree, for harness.check"
        return _git(root, "commit-tree", tree, "-p", head, "-m", message, environment=environment), len(changed)


def _environments(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The interpreter of each side: this one for both where both depend on the same packages."""
    wanted = {name: _dependencies(folder / name) for name in ("base", "head")}
    if wanted["base"] == wanted["head"]:
        return dict.fromkeys(wanted, sys.executable), ()
    pythons = {name: _make_environment(folder / f"venv-{name}", packages) for name, packages in wanted.items()}
    changed = sorted(set(wanted["base"]) ^ set(wanted["head"]))
    return pythons, (f"each side has an environment of its own: their dependencies differ ({', '.join(changed)})",)


def _dependencies(tree: Path) -> tuple[str, ...]:
    """What a tree depends on to run; nothing where it does not say."""
    try:
        found = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(sorted(found.get("project", {}).get("dependencies", ())))


def _make_environment(folder: Path, packages: tuple[str, ...]) -> str:
    """The interpreter of a new environment with `packages`."""
    python = folder / "bin" / "python"
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, *_NEEDED])
    except subprocess.CalledProcessError as error:
        told = (error.stderr or error.stdout or "").strip().splitlines()
        why = next((line for line in reversed(told) if "error" in line.lower()), told[-1] if told else str(error))
        raise EnvironmentFailed(f"the packages of a side could not be installed: {why}") from error
    return str(python)


def _short(root: Path, commit: str) -> str:
    return _git(root, "rev-parse", "--short=12", commit)


def _git(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What git answers, asked at `root`: neither hooks nor variables that name another repository have a say.

    Raises:
        EnvironmentFailed: it fails, and why. FileNotFoundError: there is no git.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "-C", str(root), *arguments]
    try:
        return _run(command, {**clean, **(environment or {})})
    except subprocess.CalledProcessError as error:
        told = error.stderr.strip().splitlines() or ["no reason given"]
        why = next((line for line in told if line.startswith(("fatal", "error"))), told[-1])
        raise EnvironmentFailed(f"git {arguments[0]}: {why}") from error


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
