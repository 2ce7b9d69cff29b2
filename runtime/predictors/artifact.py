"""Trained predictors on disk: one safetensors file that says what it is and which model it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime.errors import ArtifactError
from runtime.files import write_atomic

FORMAT = "expertflow-predictor"
VERSION = 1


class RoutingShape(NamedTuple):
    """What a predictor must know of a model: MoE layers, experts per layer, experts per token."""

    layers: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Artifact:
    """A trained predictor.

    Attributes:
        kind: name of the predictor, as in a profile.
        model: name of the model whose routing it learned: its folder's name or hub id.
        shape: of that model.
        params: numbers, strings and lists that the predictor needs beside its arrays; JSON.
        arrays: weights by name.
    """

    kind: str
    model: str
    shape: RoutingShape
    params: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def write_artifact(path: str | Path, artifact: Artifact) -> None:
    """Write `artifact` to `path`, wholly or not at all.

    Raises:
        ArtifactError: it cannot be written.
    """
    about = {
        "kind": artifact.kind,
        "model": artifact.model,
        "shape": artifact.shape._asdict(),
        "params": dict(artifact.params),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)}
    arrays = {name: np.ascontiguousarray(array) for name, array in artifact.arrays.items()}
    try:
        write_atomic(Path(path), save(arrays, metadata))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write the predictor: {error.strerror or error}") from error


def check_target(path: str | Path, kind: str, shape: RoutingShape) -> None:
    """Before minutes of work: an artefact can be written to `path`, and replaces only an earlier one of its kind.

    Raises:
        ArtifactError: it cannot, or would, and the way out.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"{path}: {folder} is not a folder that can be written to; name another")
    if not path.exists():
        return
    try:
        read_artifact(path, kind=kind, shape=shape)
    except ArtifactError:
        raise ArtifactError(
            f"{path}: exists, and is no {kind} predictor for a model of this shape; delete it or name another"
        ) from None


def read_artifact(
    path: str | Path, *, shape: RoutingShape, kind: str | None = None, model: str | None = None
) -> Artifact:
    """Read an artefact and check that it is for a model of `shape` (and a `kind`, and of that model name, where given).

    Raises:
        ArtifactError: it cannot be read, is damaged, newer than this version, or for something else; and the way out.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            is_one = metadata.get("format") == FORMAT  # of other files numpy cannot read every dtype
            arrays = {name: file.get_tensor(name) for name in file.keys()} if is_one else {}  # noqa: SIM118 -- not a dict
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read the predictor: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged, or not a safetensors file ({error}); {_AGAIN}") from error
    found = _described(path, metadata, arrays)
    if kind is not None and found.kind != kind:
        raise ArtifactError(f"{path}: holds a {found.kind} predictor, not {kind}; {_AGAIN}")
    if found.shape != shape:
        raise ArtifactError(
            f"{path}: belongs to {found.model} ({_text(found.shape)}), not to a model of {_text(shape)}; {_AGAIN}"
        )
    if model is not None and found.model != model:
        raise ArtifactError(f"{path}: belongs to {found.model}, not to {model}; {_AGAIN}")
    return found


_AGAIN = "train one on this model's traces: python -m harness.fit"


def _described(path: Path, metadata: Mapping[str, str], arrays: dict[str, npt.NDArray[Any]]) -> Artifact:
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: a safetensors file, but not a predictor; {_AGAIN}")
    try:
        version = int(metadata["version"])
        if version > VERSION:
            raise ArtifactError(f"{path}: version {version} is newer than {VERSION}; upgrade expertflow")
        about: dict[str, Any] = json.loads(metadata["about"])
        found = Artifact(about["kind"], about["model"], RoutingShape(**about["shape"]), about["params"], arrays)
        _check_types(found)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its description is damaged ({error!r}); {_AGAIN}") from error
    return found


def _check_types(found: Artifact) -> None:
    if not isinstance(found.kind, str) or not isinstance(found.model, str) or not isinstance(found.params, dict):
        raise TypeError("kind and model must be texts, params an object")
    if not all(type(size) is int and size > 0 for size in found.shape):
        raise TypeError("a size of the model is no count")


def _text(shape: RoutingShape) -> str:
    return f"{shape.layers} layers x {shape.experts} experts, top-{shape.top_k}"
