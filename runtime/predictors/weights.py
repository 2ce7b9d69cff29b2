"""Trained networks from artefacts: whether sizes and arrays belong together, before memory is taken on their word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from runtime.predictors.artifact import Artifact

_MOST = {"window": 4096}
_MOST_OF_OTHERS = 1 << 16


def sizes_of(artifact: Artifact) -> dict[str, int]:
    """`params.sizes` of an artefact: counts from 1, of layers no more than there are arrays for.

    Raises:
        KeyError, TypeError, ValueError: they are none.
    """
    sizes = artifact.params["sizes"]
    if not isinstance(sizes, dict):
        raise TypeError("sizes are no object")
    for name, size in sizes.items():
        most = len(artifact.arrays) if name.endswith("layers") else _MOST.get(name, _MOST_OF_OTHERS)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"{name} is no count from 1 to {most}")
    return sizes


def check_weights(make: Callable[[], nn.Module], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Whether `arrays` hold every weight, finite, of the network that `make` builds (here: without memory).

    Raises:
        KeyError, ValueError: they do not.
    """
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in make().named_parameters()}
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name}: shape {arrays[name].shape} instead of {shape}")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name}: not finite numbers")
