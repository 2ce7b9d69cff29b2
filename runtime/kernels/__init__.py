"""Kernels: each computes one call of an experts module, expert by expert as they arrive.

Each accumulates in the order and dtype in which its resident counterpart does: the result is the same to the bit.

    eager        the loop of the class's own forward: `index_add_` in ascending order of experts
    grouped_mm   transformers' grouped_mm: rows by (token, rank), weighted and summed over the ranks
    gemv         like grouped_mm, with our own matrix-vector kernel

Experts that are computed on the host (`HostArrival`) are rounded otherwise, and their rows take the same places.
"""

from __future__ import annotations

from runtime.kernels.base import Arrival, ComputedRows, HostArrival, Kernel, Weights
from runtime.kernels.eager import EagerKernel
from runtime.kernels.rows import GemvKernel, GroupedKernel

__all__ = [
    "KERNELS",
    "Arrival",
    "ComputedRows",
    "EagerKernel",
    "GemvKernel",
    "GroupedKernel",
    "HostArrival",
    "Kernel",
    "Weights",
]

KERNELS: dict[str, type[Kernel]] = {"eager": EagerKernel, "grouped_mm": GroupedKernel, "gemv": GemvKernel}
