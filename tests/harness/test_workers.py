"""Several workers on one study: real processes, a journal file and a real PostgreSQL.

Run as a program, this file is one such worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.search.leases import Worker, lives
from harness.search.outcome import Kind, Limits, Measurement, Outcome
from harness.search.space import Params, Setting, Space
from harness.search.study import Study
from runtime.errors import UsageError
from runtime.profile import Profile

FIXED = {
    "compute.prefill": "eager",
    "compute.decode": "eager",
    "transfer.io_threads": 2,
    "cache.policy": "lru",
    "prefetch.depth": 0,
}
PASSWORD = "not/for@eyes"


def space(fit: int) -> Space:
    """Three or four numbers of slots, and four ways to group."""
    return Space(Setting(64, fit, 4), Profile.default().with_overrides(FIXED), fixed=tuple(FIXED))


def open_study(storage: str | None, folder: Path, **options: Any) -> Study:
    options = {"sampler": "brute", **options}
    fit = options.pop("fit", 3)
    return Study(folder, space(fit=fit), {"model": "m"}, limits=Limits(), seed=0, storage=storage, **options)


def machine(params: Params) -> Outcome:
    """A made-up machine."""
    slots, group = int(params["slots"]), int(params["group"])
    made = Measurement((100 - slots) / group**0.5, 1.0, 1.0, 1.0, "sha", (slots + group) << 20, slots, 0.1, 1.0, 10)
    return Outcome(Kind.OK, result=dataclasses.asdict(made))


def worker(storage: str, folder: str, sampler: str, num_trials: int, trial_s: float, fit: int) -> None:
    """Runs trials until there are `num_trials` of all workers or no more; says what it does on stdout, one JSON a
    line."""
    print(json.dumps("imported"), flush=True)
    sys.stdin.readline()
    resume = storage == "" and (Path(folder) / "study.journal").exists()
    study = open_study(storage or None, Path(folder), sampler=sampler, resume=resume, fit=fit)
    while len(study.records()) < num_trials and (proposal := study.ask()):
        print(json.dumps({"asked": proposal.params}), flush=True)
        time.sleep(trial_s)
        study.tell(proposal, machine(proposal.params))
        print(json.dumps({"told": proposal.params}), flush=True)


class Process:
    """A worker of the function above, its imports done."""

    def __init__(
        self, storage: str, folder: Path, sampler: str, num_trials: int, trial_s: float = 0.0, fit: int = 3
    ) -> None:
        argument = json.dumps([storage, str(folder), sampler, num_trials, trial_s, fit])
        self.process = subprocess.Popen(
            [sys.executable, __file__, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.says() == "imported"

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def says(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def rest(self) -> list[Any]:
        output, _ = self.process.communicate(timeout=120)
        return [json.loads(line) for line in output.splitlines() if line.endswith("}")]

    def kill(self) -> list[Any]:
        self.process.send_signal(signal.SIGKILL)
        return self.rest()


def as_database_owner() -> tuple[list[str], int]:
    """What to put before a command of PostgreSQL, which refuses to run as root, and whose files are its."""
    if os.getuid() != 0:
        return [], os.getuid()
    owner = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"], owner.pw_uid


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A server on a free port of the loopback, its data in `folder`; yields a URL without the database's name."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    where = os.pathsep.join([*(str(path) for path in reversed(programs)), os.environ.get("PATH", "")])
    initdb, server = shutil.which("initdb", path=where), shutil.which("postgres", path=where)
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    before, uid = as_database_owner()
    if before and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv")
    data, password = folder / "data", folder / "password"
    password.write_text(PASSWORD)
    for path in (folder, password):
        os.chown(path, uid, -1)
    common = [*before, initdb, "-D", str(data), "-U", "tuner", "--auth=scram-sha-256", f"--pwfile={password}"]
    subprocess.run([*common, "--no-sync"], check=True, capture_output=True, cwd=folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    running = subprocess.Popen(
        [*before, server, "-D", str(data), *(f"--{key}={value}" for key, value in settings.items())],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"postgresql://tuner:{PASSWORD.replace('/', '%2F').replace('@', '%40')}@127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'expertflow[postgres]'")
    folder = Path(tempfile.mkdtemp(prefix="expertflow-postgresql-"))
    try:
        with postgresql(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """URL of a database of the test's own, empty: nobody has made Optuna's tables."""
    import psycopg

    name, until = f"test_{abs(hash(request.node.nodeid))}", time.monotonic() + 30
    while True:
        try:
            with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
            return f"{server}/{name}"
        except psycopg.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def share(storage: str, folder: Path, sampler: str, num_trials: int) -> Study:
    """Two workers begin at one moment, each with its own idea of how many slots fit; checks what both have done."""
    workers = [Process(storage, folder / str(fit), sampler, num_trials, 0.02, fit=fit) for fit in (3, 4)]
    for one in workers:
        one.begin()
    said = [one.rest() for one in workers]
    assert [one.process.returncode for one in workers] == [0, 0]
    told = [[line["told"] for line in lines if "told" in line] for lines in said]
    study = open_study(storage, folder, sampler="random")
    launched = [record for record in study.records() if not record.reused]
    assert Counter(json.dumps(r.params) for r in launched) == Counter(json.dumps(p) for one in told for p in one)
    assert min(map(len, told)) >= len(launched) / 5
    numbers = [trial.number for trial in study._study.trials]
    assert numbers == list(range(len(numbers))) and study.decisions["setting"]["num_slots_fit"] in (3, 4)
    assert {trial.state.name for trial in study._study.trials} <= {"COMPLETE", "FAIL"}
    return study


def assert_nothing_ran_twice_at_once(study: Study) -> None:
    ran: dict[str, list[Any]] = {}
    for trial in study._study.trials:
        if trial.user_attrs.get("reused") is False:
            ran.setdefault(json.dumps(trial.user_attrs["params"], sort_keys=True), []).append(trial)
    for trials in ran.values():
        trials.sort(key=lambda trial: trial.datetime_complete)
        for earlier, later in itertools.pairwise(trials):
            assert earlier.datetime_complete.timestamp() <= later.user_attrs["lease"]["until"] - 3600 + 0.01


def test_two_workers_on_a_new_postgresql_run_every_configuration_once(database: str, tmp_path: Path) -> None:
    study = share(database, tmp_path, "brute", 1000)
    launched = [record.params for record in study.records() if not record.reused]
    assert sorted(map(str, launched)) == sorted(map(str, study.space.configurations()))


def test_two_workers_on_one_postgresql_search_together(database: str, tmp_path: Path) -> None:
    study = share(database, tmp_path, "tpe", 10)
    assert 10 <= len(study.records()) <= 12
    assert_nothing_ran_twice_at_once(study)


def test_two_workers_on_one_journal_run_every_configuration_once(tmp_path: Path) -> None:
    study = share(f"journal://{tmp_path}/shared.journal", tmp_path, "brute", 1000)
    launched = [record.params for record in study.records() if not record.reused]
    assert sorted(map(str, launched)) == sorted(map(str, study.space.configurations()))


def _killed_mid_trial(storage: str, folder: Path) -> None:
    victim = Process(storage, folder / "victim", "brute", 1000, trial_s=60.0)
    victim.begin()
    default = victim.says()["asked"]
    survivor = open_study(storage, folder)
    other = survivor.ask()
    assert default == survivor.space.default and other is not None and other.params != default
    assert [trial.state.name for trial in survivor._study.trials] == ["RUNNING"] * 2
    victim.kill()
    again = survivor.ask()
    assert again is not None and again.params == default
    assert [trial.state.name for trial in survivor._study.trials] == ["FAIL", "RUNNING", "RUNNING"]


def test_the_trial_of_a_worker_that_was_killed_is_given_up_on_postgresql(database: str, tmp_path: Path) -> None:
    _killed_mid_trial(database, tmp_path)


def test_the_trial_of_a_worker_that_was_killed_is_given_up_on_a_journal(tmp_path: Path) -> None:
    _killed_mid_trial(f"journal://{tmp_path}/shared.journal", tmp_path)


def test_a_password_is_not_shown_when_the_database_refuses_it(database: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="password authentication failed") as caught:
        open_study(database.replace("tuner:", "nobody:"), tmp_path)
    assert "eyes" not in str(caught.value) and "***" in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'expertflow[postgres]'")
    with pytest.raises(UsageError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x cannot be used: .*refused"):
        open_study("postgresql://me:secret@127.0.0.1:1/x", tmp_path)


def test_kill_9_at_any_moment_loses_at_most_the_running_trial(tmp_path: Path) -> None:
    told: list[Params] = []
    for num_lines in (3, 6, 9):  # twice in a trial, once while it looks for the next
        process = Process("", tmp_path, "brute", 1000, trial_s=0.1)
        process.begin()
        said = [process.says() for _ in range(num_lines)]
        time.sleep(random.Random(num_lines).uniform(0, 0.05))
        said += process.kill()
        told += [line["told"] for line in said if "told" in line]
    resumed = open_study(None, tmp_path, resume=True)
    kept = [record.params for record in resumed.records()]
    assert len(told) >= 8 and [params for params in told if params not in kept] == []
    assert len(kept) - len(told) <= 3  # told, and killed before it said so
    assert Counter(map(str, kept)).most_common(1)[0][1] == 1
    until = time.monotonic() + 15  # one that was killed before it had claimed its trial left no name
    while any(trial.state.name == "RUNNING" for trial in resumed._study.trials):
        assert time.monotonic() < until
        time.sleep(0.2)
        if (proposal := resumed.ask()) is not None:
            resumed.abandon(proposal)


def test_a_lease_is_dead_once_its_process_is_gone_or_its_time_is_up() -> None:
    here = Worker.here()
    lease = here.lease(60)
    assert lives({}) and lives({"lease": lease}) and not lives({"lease": here.lease(-1)})
    assert not lives({"claim": here.lease(-1)}) and lives({"claim": here.lease(-1), "lease": lease})
    gone = subprocess.Popen(["true"])
    gone.wait()
    elsewhere = {**lease, "pid": gone.pid, "host": "another machine"}
    assert not lives({"lease": {**lease, "pid": gone.pid}}) and lives({"lease": elsewhere})
    assert not lives({"lease": {**lease, "started": lease["started"] - 1}})  # the number went to another process
    assert not lives({"lease": {**elsewhere, "until": time.time() - 1}})


def test_the_journal_of_a_folder_is_for_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that was killed, and is started again under another name, has not to wait for its own lease."""
    monkeypatch.setattr("platform.node", lambda: "the container before")
    first = open_study(None, tmp_path).ask()
    shared = f"journal://{tmp_path}/shared.journal"
    elsewhere = open_study(shared, tmp_path).ask()
    monkeypatch.undo()
    again, other = open_study(None, tmp_path, resume=True).ask(), open_study(shared, tmp_path).ask()
    assert first is not None and again is not None and first.params == again.params
    assert elsewhere is not None and other is not None and elsewhere.params != other.params


def test_what_was_measured_after_its_lease_ran_out_is_kept(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/shared.journal"
    slow, other = open_study(storage, tmp_path, lease_s=-1.0), open_study(storage, tmp_path)
    late = slow.ask()
    assert late is not None
    again = other.ask()
    assert again is not None and again.params == late.params
    slow.tell(late, machine(late.params))
    other.tell(again, machine(again.params))
    assert [record.params for record in other.records()] == [late.params] * 2
    assert [trial.state.name for trial in other._study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
