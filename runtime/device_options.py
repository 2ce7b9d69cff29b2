"""`--device NAME` and `--gpu N` of the command lines: the same for all that compute."""

from __future__ import annotations

import argparse

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
