"""What the fits that train a network share; the only part of it that imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from harness.fitting.base import FitOptions


@contextmanager
def settings_of_torch(options: FitOptions) -> Iterator[None]:
    """Its threads and its random numbers are the caller's again afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def copied_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it is now, which further training does not change."""
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}
