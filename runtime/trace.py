"""Routing traces: which experts the routers chose for every token of a run. Read, write, check, record.

The file is an .npz of plain arrays (never pickled); see `RoutingTrace` for what is in it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import TraceError
from runtime.files import write_atomic
from runtime.vocabulary import Pass

Array = npt.NDArray[Any]

# In `predicted`: nothing was forecast here, as for the layers beyond the last one.
NO_PREDICTION = np.iinfo(np.uint16).max

# Name: dtype, rank, and how many leading dimensions are those of `experts`.
_FIELDS: dict[str, tuple[Any, int, int]] = {
    "experts": (np.uint16, 3, 3),
    "request": (np.int32, 1, 1),
    "weights": (np.float16, 3, 3),
    "token_ids": (np.int32, 1, 1),
    "step": (np.int32, 1, 1),
    "phase": (np.uint8, 1, 1),
    "predicted": (np.uint16, 4, 2),
}


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """One run's routing; tokens in the order in which they were computed.

    Attributes:
        experts: uint16 [tokens, layers, top_k], by descending routing weight.
        request: int32 [tokens], the sequence that a token belongs to.
        meta: at least `num_experts`; usually model, expert_bytes, `tasks` (a name per request), source, licence.
        weights: float16 [tokens, layers, top_k], the routing weights of `experts`.
        token_ids: int32 [tokens].
        step: int32 [tokens], the forward pass that a token was in; None: each token is its own.
        phase: uint8 [tokens], the values of `vocabulary.Phase`.
        predicted: uint16 [tokens, layers, depth, k], the gate lookahead made live at a layer for the layer 1 … depth
            ahead; `NO_PREDICTION` where there was none.
    """

    experts: Array
    request: Array
    meta: Mapping[str, Any] = field(default_factory=dict)
    weights: Array | None = None
    token_ids: Array | None = None
    step: Array | None = None
    phase: Array | None = None
    predicted: Array | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of `experts`."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.experts.shape[2])

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.meta["num_experts"])

    def task(self, request: int) -> str:
        """What kind of request it is: entry `request` of `meta.tasks`, "default" where there is none."""
        tasks = self.meta.get("tasks")
        return str(tasks[request]) if isinstance(tasks, list) and 0 <= request < len(tasks) else "default"


def read_trace(path: str | Path) -> RoutingTrace:
    """Read and check a trace; arrays of other dtypes are converted where every value fits.

    Raises:
        TraceError: names the file, the field and what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            arrays = _load_arrays(file)
        return validate(RoutingTrace(meta=_parse_meta(arrays.pop("meta")), **arrays))
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def write_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Check `trace` and write it to `path`, wholly or not at all.

    Raises:
        TraceError: names the field and what is wrong with it, or why the file cannot be written.
    """
    trace = validate(trace)
    try:
        meta = json.dumps(dict(trace.meta))
    except TypeError as error:
        raise TraceError(f"meta: cannot be written as JSON: {error}") from error
    arrays = {name: array for name in _FIELDS if (array := getattr(trace, name)) is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, meta=np.array(meta), **arrays)
    try:
        write_atomic(Path(path), buffer.getvalue())
    except OSError as error:
        raise TraceError(f"{path}: cannot write the trace: {error.strerror or error}") from error


def validate(trace: RoutingTrace) -> RoutingTrace:
    """`trace` with every array in the dtype of the format.

    Raises:
        TraceError: names the field and what is wrong with it.
    """
    num_experts = _num_experts(trace.meta)
    arrays = {
        name: _checked(name, array, num_experts) for name in _FIELDS if (array := getattr(trace, name)) is not None
    }
    experts = arrays["experts"]
    if not experts.size:
        raise TraceError(f"experts: shape {experts.shape} holds nothing")
    if experts.shape[2] > num_experts:
        raise TraceError(f"experts: {experts.shape[2]} experts per token, but meta.num_experts is {num_experts}")
    for name, array in arrays.items():
        same = _FIELDS[name][2]
        if array.shape[:same] != experts.shape[:same]:
            raise TraceError(f"{name}: shape {array.shape} does not go with experts of shape {experts.shape}")
    return RoutingTrace(meta=dict(trace.meta), **arrays)


def _load_arrays(file: io.BufferedReader) -> dict[str, Array]:
    try:
        content = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError("not an .npz file of arrays") from error
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise TraceError("not an .npz file but a single array; a trace has at least experts, request and meta")
    if missing := [name for name in ("experts", "request", "meta") if name not in content.files]:
        raise TraceError(f"{missing[0]} is missing; the file has {', '.join(content.files) or 'nothing'}")
    return {name: _load_array(content, name) for name in ("meta", *_FIELDS) if name in content.files}


def _load_array(content: Any, name: str) -> Array:
    try:
        array = content[name]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise TraceError(f"{name} cannot be read, the file is damaged or holds Python objects: {error}") from error
    if not isinstance(array, np.ndarray):
        raise TraceError(f"{name} is not an array")
    return array


def _parse_meta(array: Array) -> dict[str, Any]:
    if array.size != 1 or array.dtype.kind not in "US":
        raise TraceError(f"meta: a JSON string is wanted, not {array.dtype} of shape {array.shape}")
    text = array.reshape(()).item()
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise TraceError(f"meta: not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise TraceError(f"meta: a JSON object is wanted, not {text[:40]!r}")
    return meta


def _num_experts(meta: Mapping[str, Any]) -> int:
    if "num_experts" not in meta:
        raise TraceError("meta: num_experts is missing (experts per layer)")
    num_experts = meta["num_experts"]
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or not 1 <= num_experts < NO_PREDICTION:
        raise TraceError(f"meta: num_experts is {num_experts!r}, not a count from 1 to {NO_PREDICTION - 1}")
    return num_experts


def _checked(name: str, array: Array, num_experts: int) -> Array:
    dtype, rank, _ = _FIELDS[name]
    wanted = np.dtype(dtype)
    if array.ndim != rank:
        raise TraceError(f"{name}: rank {rank} is wanted, not shape {array.shape}")
    if wanted.kind == "f":
        return _checked_weights(name, array, wanted)
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name}: integers are wanted, not {array.dtype}")
    of_experts = name in ("experts", "predicted")
    highest = num_experts - 1 if of_experts else 1 if name == "phase" else int(np.iinfo(wanted).max)
    outside = (array < 0) | (array > highest)
    if name == "predicted":
        outside &= array != NO_PREDICTION
    if outside.any():
        place = tuple(int(axis[0]) for axis in np.nonzero(outside))
        raise TraceError(f"{name}: {array[place]} at {list(place)} is outside 0 to {highest}")
    return array.astype(wanted, copy=False)


def _checked_weights(name: str, array: Array, wanted: np.dtype[Any]) -> Array:
    if array.dtype.kind != "f":
        raise TraceError(f"{name}: floating-point numbers are wanted, not {array.dtype}")
    with np.errstate(over="ignore"):
        converted = array.astype(wanted, copy=False)
    if not np.isfinite(converted).all():
        raise TraceError(f"{name}: a value is infinite, not a number, or too large for {wanted}")
    return converted


class _RecordedPass:
    """Routing of one pass, in the dtypes of the format from the start: long runs are held in memory."""

    def __init__(self, passing: Pass, num_layers: int) -> None:
        self.num_tokens, self.step = passing.num_tokens, passing.step
        self.layers: set[int] = set()
        self._num_layers, self._num_weighted = num_layers, 0
        self._arrays: dict[str, Array] = {
            "request": np.array(passing.requests or [0] * passing.num_tokens, np.int32),
            "step": np.full(passing.num_tokens, passing.step, np.int32),
            "phase": np.full(passing.num_tokens, passing.phase, np.uint8),
        }
        if len(passing.token_ids) == passing.num_tokens:
            self._arrays["token_ids"] = np.array(passing.token_ids, np.int32)

    def put(self, layer: int, experts: Array, weights: Array | None, predicted: Array | None) -> None:
        self.layers.add(layer)
        if weights is not None:
            self._num_weighted += 1
            order = np.argsort(-weights, axis=1, kind="stable")
            experts, weights = (np.take_along_axis(array, order, axis=1) for array in (experts, weights))
        for name, array in (("experts", experts), ("weights", weights), ("predicted", predicted)):
            if array is not None:
                self._put(name, layer, array)

    def _put(self, name: str, layer: int, array: Array) -> None:
        if name not in self._arrays:
            fill = NO_PREDICTION if name == "predicted" else 0
            shape = (self.num_tokens, self._num_layers, *array.shape[1:])
            self._arrays[name] = np.full(shape, fill, _FIELDS[name][0])
        with np.errstate(over="ignore"):  # a weight that is too large is found by `validate`
            self._arrays[name][:, layer] = array

    def array(self, name: str) -> Array | None:
        """A field of the format, None where this pass did not come with it."""
        return None if name == "weights" and self._num_weighted < self._num_layers else self._arrays.get(name)


class TraceRecorder:
    """Collects a trace while a model runs: `begin` a pass, `record` each of its layers in any order, at last `trace`.

    Args:
        num_layers, num_experts: of the model; top_k is that of the first layer recorded.
        meta: goes into the trace; `num_experts` is added, and `tasks` where passes name tasks.

    Token ids, weights and predictions are kept only if every pass came with them.
    """

    def __init__(self, num_layers: int, num_experts: int, meta: Mapping[str, Any] | None = None) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts
        self._meta = {**(meta or {}), "num_experts": num_experts}
        self._per_token: dict[str, tuple[int, ...]] = {}  # by field: the shape that the first layer had
        self._tasks: dict[int, str] = {}
        self._passes: list[_RecordedPass] = []

    def begin(self, passing: Pass) -> None:
        """A forward pass starts; the one before it, if any, is complete.

        Raises:
            TraceError: the pass before it lacks layers.
        """
        self._end()
        self._passes.append(_RecordedPass(passing, self._num_layers))
        self._tasks.update(zip(passing.requests, passing.tasks, strict=False))

    def record(self, layer: int, experts: Array, weights: Array | None = None, predicted: Array | None = None) -> None:
        """What the router of `layer` chose in the running pass.

        Args:
            layer: 0 … num_layers - 1.
            experts: integers [tokens, top_k]; stored by descending weight, without weights in the router's order.
            weights: floats of the same shape, the routing weights of `experts`.
            predicted: uint16 [tokens, depth, k], what was forecast at `layer`; see `RoutingTrace.predicted`.

        Raises:
            TraceError: no pass was begun, the layer was recorded before, a shape does not fit, or an expert is out of
                range.
        """
        if not self._passes:
            raise TraceError("record: no pass was begun")
        running = self._passes[-1]
        if layer in running.layers or not 0 <= layer < self._num_layers:
            raise TraceError(
                f"record: layer {layer} is none of {self._num_layers}, or ran before in this pass; "
                "the routing of a model that runs its layers several times per pass cannot be recorded"
            )
        for name, array in (("experts", experts), ("weights", weights), ("predicted", predicted)):
            if array is not None:
                self._check_shape(f"layer {layer}: {name}", name, array, running.num_tokens)
        outside = experts[(experts < 0) | (experts >= self._num_experts)]
        if outside.size:
            raise TraceError(f"record: layer {layer}: experts: {outside[0]} is outside 0 to {self._num_experts - 1}")
        running.put(layer, experts, weights, predicted)

    def trace(self) -> RoutingTrace:
        """Everything recorded so far; recording can go on.

        Raises:
            TraceError: nothing was recorded, the last pass lacks layers, or a value does not fit the format.
        """
        self._end()
        if not self._passes:
            raise TraceError("record: no pass was recorded")
        meta = dict(self._meta)
        if self._tasks:
            named = [self._tasks.get(number, "default") for number in range(max(self._tasks) + 1)]
            meta.setdefault("tasks", named)
        fields: dict[str, Any] = {name: self._joined(name) for name in _FIELDS}
        return validate(RoutingTrace(meta=meta, **fields))

    def _check_shape(self, what: str, name: str, array: Array, num_tokens: int) -> None:
        kind = "predicted" if name == "predicted" else "experts"
        if array.ndim == _FIELDS[name][1] - 1:
            self._per_token.setdefault(kind, array.shape[1:])
        shape = (num_tokens, *self._per_token.get(kind, ()))
        if array.shape != shape:
            raise TraceError(f"record: {what} of shape {array.shape}, not {shape}")

    def _joined(self, name: str) -> Array | None:
        parts = [array for recorded in self._passes if (array := recorded.array(name)) is not None]
        return np.concatenate(parts) if len(parts) == len(self._passes) else None

    def _end(self) -> None:
        if not self._passes:
            return
        recorded = self._passes[-1]
        if missing := sorted(set(range(self._num_layers)) - recorded.layers):
            names = ", ".join(map(str, missing))
            raise TraceError(f"record: pass {recorded.step} ended without layers {names} of {self._num_layers}")
