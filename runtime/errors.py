"""Errors that a user can meet. Each message says what was wrong, with the value, and the way out."""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable


class ExpertFlowError(Exception):
    """Base of every error that the user can act on; the command lines print it as one line and exit with 2."""


class CheckpointError(ExpertFlowError):
    """A path that is not a usable checkpoint: not one at all, a missing shard, a truncated or corrupt file."""


class UnsupportedModelError(ExpertFlowError):
    """A checkpoint that is sound but that this runtime does not serve: dense, quantised, an unsupported family."""


class BudgetError(ExpertFlowError):
    """A memory budget in which the configuration cannot run."""


class ProfileError(ExpertFlowError):
    """A profile that cannot be read, or that does not belong to this model or machine."""


class TraceError(ExpertFlowError):
    """A routing trace that is malformed."""


class ArtifactError(ExpertFlowError):
    """A trained predictor that is damaged, newer than this version, or for another model."""


class PromptError(ExpertFlowError):
    """A prompt, or a file of prompts, that cannot be run."""


class DeviceError(ExpertFlowError):
    """A compute device that is not there or that cannot be used."""


class TransferError(ExpertFlowError):
    """Expert bytes could not be brought into their slot: a failed or a short read."""


class UsageError(ExpertFlowError):
    """A command line whose arguments do not make sense together."""


def cli_main(run: Callable[[], int | None]) -> int:
    """Exit code of a command: `run`'s own (None is 0), 2 for a user's mistake (one line on stderr), 130 for Ctrl-C.

    A GPU whose memory runs out, or that has failed, is one that the user can act on, too.
    """
    try:
        return run() or 0
    except ExpertFlowError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        way_out = _WAYS_OUT.get(type(error).__name__)  # torch's errors, which is not to be imported for them
        if way_out is None:
            raise
        print(f"error: {one_line(str(error).partition(chr(10))[0].partition('. ')[0])}; {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Python takes one that came within an `exec` of a string, as dataclasses are made by, for one that nobody
        # caught, and ends by the signal instead of with this code, unless another `exec` has come to its end since.
        exec("")
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        # What libraries tear down now, torch for up to a second, is no longer to be broken off, nor to change the code.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def one_line(error: BaseException | str) -> str:
    """What an error says, as a line that a terminal can show, however much of a mangled file it quotes."""
    line = " ".join(str(error).split())
    shown = line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]} …"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown)


_WAYS_OUT = {
    "OutOfMemoryError": "take fewer expert slots (--set cache.slots=…), shorter prompts, or fewer of them at a time",
    "AcceleratorError": "the GPU can do nothing more for this process: start it anew, and see `dmesg`",
}
_MOST_CHARACTERS = 2000
