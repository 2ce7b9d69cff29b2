"""Worktrees of a comparison: what is in them, what stays as it was, and that they are gone afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from paired_fakes import Repository, make_repository

from harness.checks import worktrees as module
from harness.checks.worktrees import EnvironmentFailed, worktrees
from runtime.errors import UsageError


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "repository")


def test_the_head_is_the_working_tree_as_it_is(repository: Repository) -> None:
    first = repository.git("rev-parse", "HEAD")
    repository.commit({"runtime/a.py": "A = 1\n", "notes.md": "notes\n"})
    repository.write(
        {
            "runtime/a.py": "A = 2\n",
            "runtime/new.py": "NEW = 1\n",
            "runtime/some.log": "ignored\n",
            "model.bin": "huge",
        }
    )
    repository.git("add", "runtime/a.py")
    repository.write({"runtime/a.py": "A = 3\n"})
    (repository.path / "notes.md").unlink()
    before = repository.state()
    with worktrees(repository.path, first) as (base, head, notes):
        assert not (base.path / "runtime/a.py").exists() and not base.commit.endswith("+")
        assert (head.path / "runtime/a.py").read_text() == "A = 3\n" and head.commit.endswith("+")
        assert (head.path / "runtime/new.py").exists() and not (head.path / "notes.md").exists()
        assert not (head.path / "runtime/some.log").exists() and not (head.path / "model.bin").exists()
        assert notes == ("head is the working tree with 3 files that are not committed",)
        assert base.python == head.python == sys.executable
        assert len(str(base.path)) == len(str(head.path))
    assert repository.state() == before
    assert not base.path.exists() and not head.path.exists()


def test_a_clean_tree_is_its_commit(repository: Repository) -> None:
    with worktrees(repository.path, "main") as (base, head, notes):
        assert base.commit == head.commit == repository.git("rev-parse", "--short=12", "HEAD") and notes == ()
        assert repository.git("-C", str(head.path), "rev-parse", "HEAD") == repository.git("rev-parse", "HEAD")


def test_hooks_of_the_user_do_not_run(repository: Repository) -> None:
    hook = repository.path / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with worktrees(repository.path, "HEAD") as (base, _, _):
        assert (base.path / "runtime/__init__.py").exists()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_they_are_removed_whatever_happens(repository: Repository, error: BaseException) -> None:
    before = repository.state()
    with pytest.raises(type(error)), worktrees(repository.path, "HEAD") as (base, _, _):
        assert len(repository.git("worktree", "list").splitlines()) == 3
        raise error
    assert repository.state() == before and not base.path.parent.exists()


def test_an_unknown_commit(repository: Repository) -> None:
    before = repository.state()
    with (
        pytest.raises(UsageError, match="--base nowhere: no such commit; name a branch"),
        worktrees(repository.path, "nowhere"),
    ):
        pass
    with pytest.raises(UsageError, match="no such commit"), worktrees(repository.path, "--force"):
        pass
    assert repository.state() == before


def test_a_worktree_that_git_cannot_make(repository: Repository) -> None:
    (repository.path / ".git/worktrees").write_text("in the way")
    before = repository.state()
    with (
        pytest.raises(EnvironmentFailed, match="git worktree: fatal: could not create"),
        worktrees(repository.path, "HEAD"),
    ):
        pass
    assert repository.state() == before


def test_a_shallow_clone_without_the_base(repository: Repository, tmp_path: Path) -> None:
    old = repository.git("rev-parse", "HEAD")
    repository.commit({"a": "1"})
    shallow = tmp_path / "shallow"
    repository.git("clone", "--quiet", "--depth", "1", f"file://{repository.path}", str(shallow))
    with pytest.raises(UsageError, match=r"this clone is shallow: .*fetch-depth: 0"), worktrees(shallow, old):
        pass


def test_what_is_no_clone(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(UsageError, match="run it in a git clone"), worktrees(tmp_path / "plain", "HEAD"):
        pass
    with pytest.raises(UsageError, match="not the top of one"), worktrees(repository.path / "runtime", "HEAD"):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="git is not installed"), worktrees(repository.path, "HEAD"):
        pass


def test_other_dependencies_have_environments_of_their_own(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, tuple[str, ...]] = {}

    def make(folder: Path, packages: tuple[str, ...]) -> str:
        made[folder.name] = packages
        return str(folder / "bin/python")

    monkeypatch.setattr(module, "_make_environment", make)
    repository.write({"pyproject.toml": '[project]\nname = "small"\ndependencies = ["numpy", "rich>=13"]\n'})
    with worktrees(repository.path, "HEAD") as (base, head, notes):
        assert base.python != head.python and base.python.endswith("venv-base/bin/python")
    assert made == {"venv-base": ("numpy",), "venv-head": ("numpy", "rich>=13")}
    assert "their dependencies differ (rich>=13)" in notes[-1]


@pytest.mark.slow
def test_an_environment_that_cannot_be_made(repository: Repository) -> None:
    for name in ("some", "nothing"):
        wanted = f"{name} @ file://{repository.path}/{name}.whl"
        repository.commit({"pyproject.toml": f'[project]\nname = "small"\ndependencies = ["{wanted}"]\n'})
    before = repository.state()
    with (
        pytest.raises(EnvironmentFailed, match=r"could not be installed: .*some\.whl"),
        worktrees(repository.path, "HEAD~1"),
    ):
        pass
    assert repository.state() == before
