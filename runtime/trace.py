"""Routing traces: which experts the routers chose for every token of a run. Read, write, check, record.

The file is an .npz of plain arrays (never pickled); see `RoutingTrace` for what is in it.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from runtime.errors import TraceError
from runtime.files import write_atomic
from runtime.vocabulary import Pass

Array = npt.NDArray[Any]

# In `predicted`: nothing was forecast here, as for the layers beyond the last one.
NO_PREDICTION = np.iinfo(np.uint16).max

MOST_EXPERTS = 1 << 20
"""Experts of all layers together: what a cache keeps for each is allocated on the word of a trace."""

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
    _check_meta(trace.meta)
    arrays = {
        name: _checked(name, array, num_experts) for name in _FIELDS if (array := getattr(trace, name)) is not None
    }
    experts = arrays["experts"]
    if not experts.size:
        raise TraceError(f"experts: shape {experts.shape} holds nothing")
    if experts.shape[2] > num_experts:
        raise TraceError(f"experts: {experts.shape[2]} experts per token, but meta.num_experts is {num_experts}")
    if experts.shape[1] * num_experts > MOST_EXPERTS:
        raise TraceError(
            f"experts: {experts.shape[1]} layers of {num_experts} experts (meta.num_experts); no model has over "
            f"{MOST_EXPERTS} in all"
        )
    for name, array in arrays.items():
        same = _FIELDS[name][2]
        if array.shape[:same] != experts.shape[:same]:
            raise TraceError(f"{name}: shape {array.shape} does not go with experts of shape {experts.shape}")
    return RoutingTrace(meta=dict(trace.meta), **arrays)


def _load_arrays(file: BinaryIO) -> dict[str, Array]:
    """The arrays of the format in an .npz file, once everything that it says of them is known to be sound."""
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGED as error:
        file.seek(0)
        is_array = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
        what = "but a single array; a trace has at least experts, request and meta" if is_array else "of arrays"
        raise TraceError(f"not an .npz file {what}") from error
    with archive:
        members = _members(archive)
        num_bytes, file_bytes = sum(member.file_size for member in members.values()), file.seek(0, 2)
        if num_bytes > max(_SMALL_BYTES, _MOST_RATIO * file_bytes):
            raise TraceError(
                f"its {file_bytes} bytes would unpack to {num_bytes}: no trace packs so well; "
                "if it is one, write it with numpy.savez, unpacked"
            )
        for name, member in members.items():
            _check_header(archive, name, member)
        return {name: _load_array(archive, name, member) for name, member in members.items()}


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Entries of the format by name; others are left alone."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise TraceError(f"{name} is in it twice")
        if name not in ("meta", *_FIELDS):
            continue
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TraceError(f"{name} is packed by a method that numpy does not use; write it with numpy.savez")
        found[name] = member
    for name in ("experts", "request", "meta"):
        if name not in found:
            names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            raise TraceError(f"{name} is missing; the file has {', '.join(names[:10]) or 'nothing'}")
    return found


def _check_header(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> None:
    """Whether the header of an array accounts for every byte of its member.

    NumPy allocates what a header claims before it looks for the bytes.
    """
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(stream)
            array_bytes = member.file_size - stream.tell()
    except _DAMAGED as error:
        raise TraceError(f"{name} cannot be read, its header is damaged: {error}") from error
    if dtype.hasobject:
        raise TraceError(f"{name} holds Python objects, which are never loaded; save it as an array of numbers")
    wanted_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or wanted_bytes != array_bytes:
        raise TraceError(
            f"{name} is damaged: shape {shape} of {dtype} makes {wanted_bytes} bytes, and it has {array_bytes}"
        )


def _load_array(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> Array:
    try:
        with archive.open(member) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return array
    except MemoryError:
        raise TraceError(f"{name}: its {member.file_size} bytes do not fit the memory that is free") from None
    except _DAMAGED as error:
        raise TraceError(f"{name} cannot be read, the file is damaged: {error}") from error


_SMALL_BYTES, _MOST_RATIO = 64 << 20, 100
"""Bytes that a file may always unpack to, and how many times its own: real traces pack to a half or a tenth."""

_DAMAGED = (
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    RuntimeError,  # encrypted
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile, its decompressors and numpy's reader of headers raise on damaged bytes; none says all of it."""


def _parse_meta(array: Array) -> dict[str, Any]:
    if array.size != 1 or array.dtype.kind not in "US":
        raise TraceError(f"meta: a JSON string is wanted, not {array.dtype} of shape {array.shape}")
    try:
        text = str(array.reshape(()).item(), "utf-8") if array.dtype.kind == "S" else array.reshape(()).item()
        meta = json.loads(text)
    except ValueError as error:
        raise TraceError(f"meta: not JSON: {error}") from error
    except RecursionError:
        raise TraceError("meta: not JSON that is read here: nested too deeply") from None
    if not isinstance(meta, dict):
        raise TraceError(f"meta: a JSON object is wanted, not {text[:40]!r}")
    return meta


def _check_meta(meta: Mapping[str, Any]) -> None:
    """What is optional in it and used."""
    expert_bytes, tasks = meta.get("expert_bytes"), meta.get("tasks")
    is_count = isinstance(expert_bytes, int) and not isinstance(expert_bytes, bool) and 0 <= expert_bytes < 2**53
    if expert_bytes is not None and not is_count:
        raise TraceError(f"meta: expert_bytes is {expert_bytes!r}, not a number of bytes")
    if tasks is not None and not (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
        raise TraceError(f"meta: tasks is {tasks!r}, not a list of names, one per request")


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
