"""Where a study is kept, and under which name: a journal file of the run's folder, or the URL of what several machines
can reach."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from harness.search.space import Space
from runtime.errors import UsageError

JOURNAL = "study.journal"
_AGREE_S, _POLL_S = 30.0, 0.02
_JOURNAL_SCHEME = "journal://"
_DRIVER_PACKAGES = {"postgres": "pip install 'expertflow[postgres]'", "mysql": "pip install pymysql"}
_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}


def redacted(text: str) -> str:
    """`text`, such as a URL or a command, without the passwords of the URLs in it."""
    text = re.sub(r"(://[^:/\s@]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd)=)[^&\s'\"]*", r"\1***", text)


def journal_of(folder: Path, storage: str | None, *, resume: bool) -> Path | None:
    """The journal file of a study, its folder made; None where `storage` is a database.

    Args:
        storage: None: the journal of `folder`; `journal:///PATH`: that one, to join or to begin; else a database.
        resume: there has to be a study in `folder` already; else there must not be.

    Raises:
        UsageError: `folder` holds a study and `resume` is not set, or holds none and it is.
    """
    if storage is not None and not storage.startswith(_JOURNAL_SCHEME):
        return None
    journal = folder / JOURNAL if storage is None else Path(storage.removeprefix(_JOURNAL_SCHEME))
    if storage is None and journal.exists() != resume:
        raise UsageError(
            f"{folder} holds no run to go on with; leave --resume out, or name its folder with --out"
            if resume
            else f"{folder} holds a run already; add --resume to go on with it, or name another folder with --out"
        )
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{journal}: the study cannot be kept there: {error.strerror}") from error
    return journal


def cut_torn_line(journal: Path) -> None:
    """Put aside what follows the last whole line: a crash cut it off, and whatever came after it would be lost.

    Whoever writes to the journal must be kept from it meanwhile.
    """
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        journal.with_suffix(".corrupt").write_bytes(data[whole:])
        os.truncate(journal, whole)


def database_url(storage: str) -> str:
    """`storage` with the driver that is installed with this project, where it names none.

    Raises:
        UsageError: it is no URL of a database.
    """
    scheme, separator, rest = storage.partition("://")
    if not separator or not rest:
        raise UsageError(
            f"--storage {redacted(storage)!r} is no URL, such as postgresql://USER@HOST/DATABASE, "
            "mysql://USER@HOST/DATABASE, sqlite:///FILE or journal:///FILE"
        )
    return f"{_DRIVERS.get(scheme, scheme)}://{rest}"


def unusable(storage: str, error: Exception) -> UsageError:
    """One line for a user: why a database cannot be used, and the way out."""
    where = redacted(storage)
    if isinstance(error, ImportError):
        way_out = next((how for kind, how in _DRIVER_PACKAGES.items() if storage.startswith(kind)), "install it")
        return UsageError(f"--storage {where}: its driver is not installed: {way_out}")
    return UsageError(f"--storage {where} cannot be used: {explained(storage, error)}")


def explained(storage: str, error: Exception) -> str:
    """The first line of the innermost reason, without the password of `storage`."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    line = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
    try:
        password = urlsplit(storage).password
    except ValueError:
        password = None
    for secret in (password, unquote(password)) if password else ():
        line = line.replace(secret, "***")
    return redacted(line)


def study_name(identity: Mapping[str, Any], space: Space) -> str:
    """The same for all workers that can share a study: machines of one kind differ by a slot or so that fits."""
    whole = replace(space.setting, num_slots_fit=space.setting.num_experts, fewer_slots=())
    return f"{name_prefix(identity)}{space.within(whole).digest()}"


def name_prefix(identity: Mapping[str, Any]) -> str:
    """With what the name of every study of `identity` begins."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"expertflow-{digest}-"


def check_same(studies: Mapping[str, Mapping[str, Any]], name: str, folder: Path, identity: Mapping[str, Any]) -> None:
    """UsageError unless the run of `folder` is the study `name`, or was ended before there was one.

    Args:
        studies: that the folder holds, name to attributes.
    """
    if name in studies or not studies:
        return
    before = next(iter(studies.values())).get("identity", {})
    wanted = json.loads(json.dumps(dict(identity)))
    differing = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key)) or ["the space"]
    raise UsageError(
        f"{folder} holds a run with other settings ({', '.join(differing)}); "
        "resume it with the command that began it, or name another folder with --out"
    )


def agreed(read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a study's first worker decided, which it writes once it has created the study; nothing if it died then.

    Args:
        read: the study's attributes.
    """
    until = time.monotonic() + _AGREE_S
    while "decisions" not in (attributes := read()):
        if time.monotonic() > until:
            return {}
        time.sleep(_POLL_S)
    return dict(attributes["decisions"])
