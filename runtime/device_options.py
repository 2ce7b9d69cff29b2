"""`--device NAME` and `--gpu N` of the command lines: the same for all that compute."""

from __future__ import annotations

import argparse

from runtime.errors import UsageError

DEFAULT = "default: as the profile was tuned"


def add_device_options(parser: argparse.ArgumentParser, default: str = DEFAULT) -> None:
    """Let a command be told which device computes; `default` says which one does otherwise."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--device", metavar="NAME", help=f"that computes: cpu, cuda:0; {default}")
    which.add_argument("--gpu", type=int, metavar="N", help="that computes, as nvidia-smi numbers them")


def named_device(options: argparse.Namespace) -> str | None:
    """The device that the options of a command name; None: none.

    Raises:
        DeviceError: there is no such GPU, or it cannot be used here.
    """
    if options.gpu is None:
        device: str | None = options.device
        return device
    from runtime.devices import numbered_gpu  # torch: not for --help

    return str(numbered_gpu(options.gpu))


def check_gpu_is_numbered(options: argparse.Namespace) -> None:
    """Of commands that examine a GPU before torch uses it: `--gpu` names one, `--device` none but the CPU."""
    if options.device not in (None, "cpu"):
        raise UsageError(f"--device {options.device}: only cpu is named so here; for a GPU give its number: --gpu 0")
    if options.device is not None and options.gpu is not None:
        raise UsageError(f"--gpu {options.gpu} and --device {options.device} exclude each other; give one of them")
