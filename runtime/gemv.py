"""`gemv`: matrices times a few vectors, for decoding. Reads each weight once, accumulates in float32, rounds once.

Compiled by Numba, which brings its own compiler. At one token the time of an expert is the time to read its weights;
torch's CPU kernels for bfloat16 reach about 60 % of this one's rate there (results/LOG.md). All experts that are ready
are one call, which torch's own OpenMP threads share: another team would fight with them for the processors. Each
element of the result is computed by the same code from its own vector and its own part of one matrix, so it depends
neither on the number of threads nor on what it is computed together with.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload


class Rows(NamedTuple):
    """Which vectors each matrix is applied to: those of matrix `i` have the numbers `starts[i]` to `starts[i + 1]`.

    Vector number `n` is row `source[n]` of the input; its result is row `target[n]` of the output. Lists, because there
    are few and each numpy call costs more than all of them.
    """

    starts: list[int]
    source: list[int]
    target: list[int]


_intrinsic: Any = intrinsic  # its own type does not know that the first argument is Numba's
_carray: Any = numba.carray  # type: ignore[attr-defined]


@_intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An int64 address as a pointer."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), codegen


@_intrinsic
def _take(typing_context, counter):  # type: ignore[no-untyped-def]
    """Atomically add 1 to the int64 that `counter` points to; its former value."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", arguments[0], context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), codegen


def _widen(weight: Any) -> Any:
    """float32 of a weight: itself, or of which a bfloat16's 16 bits are the upper half."""


@overload(_widen, inline="always")
def _widen_compiled(weight):  # type: ignore[no-untyped-def]
    if weight == types.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: weight


def _narrow(value: Any, dtype: Any) -> Any:
    """A float32 as it is, or rounded to nearest even as bfloat16 bits, where a NaN stays one."""


@overload(_narrow, inline="always")
def _narrow_compiled(value, dtype):  # type: ignore[no-untyped-def]
    def to_bfloat16(value, dtype):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return to_bfloat16 if dtype.instance_type == types.uint16 else lambda value, dtype: np.float32(value)


# A job is one int64 array: these numbers, then the addresses of the matrices, then starts, source and target.
_NEXT_BLOCK, _NUM_MATRICES, _NUM_OUTPUTS, _NUM_INPUTS, _NUM_VECTORS, _NUM_RESULTS, _NUM_ROWS, _X, _OUT, _HEADER = range(
    10
)

# No `nnan`/`ninf`: an overflowing activation must come out as it does from torch.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
# The unit that threads take; fixed, so that an element is always at the same place of the same vector loop.
_BLOCK_OUTPUTS = 128


@numba.njit
def _unpack(job):  # type: ignore[no-untyped-def]
    """The addresses of the matrices, x, starts, source, target of a job."""
    header = _carray(job, (_HEADER,), np.int64)
    num_matrices, num_results = header[_NUM_MATRICES], header[_NUM_RESULTS]
    first_start = _HEADER + num_matrices
    first_source = first_start + num_matrices + 1
    all_numbers = _carray(job, (first_source + 2 * num_results,), np.int64)
    return (
        all_numbers[_HEADER:first_start],
        _carray(_pointer(header[_X]), (header[_NUM_VECTORS], header[_NUM_INPUTS]), np.float32),
        all_numbers[first_start:first_source],
        all_numbers[first_source : first_source + num_results],
        all_numbers[first_source + num_results :],
    )


@numba.njit(fastmath=_FASTMATH)
def _rows(job, dtype):  # type: ignore[no-untyped-def]
    """out[target] = weight @ x[source]; weights [outputs, inputs] and out of `dtype`."""
    header = _carray(job, (_HEADER,), np.int64)
    num_outputs, num_inputs = header[_NUM_OUTPUTS], header[_NUM_INPUTS]
    weights, x, starts, source, target = _unpack(job)
    out = _carray(_pointer(header[_OUT]), (header[_NUM_ROWS], num_outputs), dtype)
    blocks_each = -(-num_outputs // _BLOCK_OUTPUTS)
    block = _take(job)
    while block < blocks_each * weights.size:
        matrix, first = block // blocks_each, block % blocks_each * _BLOCK_OUTPUTS
        weight = _carray(_pointer(weights[matrix]), (num_outputs, num_inputs), dtype)
        for i in range(first, min(first + _BLOCK_OUTPUTS, num_outputs)):
            for n in range(starts[matrix], starts[matrix + 1]):
                total = np.float32(0.0)
                for j in range(num_inputs):
                    total += _widen(weight[i, j]) * x[source[n], j]
                out[target[n], i] = _narrow(total, dtype)
        block = _take(job)


@numba.njit(fastmath=_FASTMATH)
def _columns(job, dtype):  # type: ignore[no-untyped-def]
    """out[target] += x[source] @ weight; weights [inputs, outputs] of `dtype`, out float32, zero at first."""
    header = _carray(job, (_HEADER,), np.int64)
    num_outputs, num_inputs = header[_NUM_OUTPUTS], header[_NUM_INPUTS]
    weights, x, starts, source, target = _unpack(job)
    out = _carray(_pointer(header[_OUT]), (header[_NUM_ROWS], num_outputs), np.float32)
    blocks_each = -(-num_outputs // _BLOCK_OUTPUTS)
    block = _take(job)
    while block < blocks_each * weights.size:
        matrix, first = block // blocks_each, block % blocks_each * _BLOCK_OUTPUTS
        weight = _carray(_pointer(weights[matrix]), (num_inputs, num_outputs), dtype)
        for i in range(num_inputs):
            for n in range(starts[matrix], starts[matrix + 1]):
                for j in range(first, min(first + _BLOCK_OUTPUTS, num_outputs)):
                    out[target[n], j] += _widen(weight[i, j]) * x[source[n], i]
        block = _take(job)


def _rows_bf16(job):  # type: ignore[no-untyped-def]
    _rows(job, np.uint16)


def _rows_f32(job):  # type: ignore[no-untyped-def]
    _rows(job, np.float32)


def _columns_bf16(job):  # type: ignore[no-untyped-def]
    _columns(job, np.uint16)


def _columns_f32(job):  # type: ignore[no-untyped-def]
    _columns(job, np.float32)


@functools.cache
def _compiled(kernel: Callable[[Any], None]) -> Any:
    """`kernel` as a C function; compiled when first used, then kept on disk."""
    return numba.cfunc(types.void(types.CPointer(types.int64)), cache=True)(kernel)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded; None where it has none."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def _run(kernel: Callable[[Any], None], job: list[int]) -> None:
    """Run `kernel` on torch's number of threads, or alone where OpenMP is missing."""
    address, numbers = _compiled(kernel).address, (ctypes.c_int64 * len(job))(*job)
    if (parallel := _openmp()) is not None:
        parallel(address, ctypes.addressof(numbers), torch.get_num_threads(), 0)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(numbers))


def gemv(
    x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Rows, out: torch.Tensor, *, is_transposed: bool
) -> None:
    """Each matrix times its vectors: weight @ vector, or vector @ weight if `is_transposed`; no bias.

    Args:
        x: [vectors, k], float32 or what the weights are. weights: at least one, [n, k] each, or [k, n] if transposed;
            contiguous, on the CPU, of one shape and dtype; bfloat16 and float32 run compiled, others through
            `torch.mv`. rows: which vectors meet which matrix, and where the results go. out: [results, n] in the
            dtype of the weights, contiguous.
    """
    dtype = weights[0].dtype
    if dtype not in (torch.bfloat16, torch.float32):
        return _with_torch(x.to(dtype), weights, rows, out, is_transposed)
    x = x.to(torch.float32).contiguous()
    if is_transposed:
        summed = torch.zeros(len(rows.target), out.shape[1])
        own = rows._replace(target=list(range(len(rows.target))))
        _run(_columns_f32 if dtype is torch.float32 else _columns_bf16, _job(weights, x, summed, own))
        out[rows.target] = summed.to(dtype)
    else:
        _run(_rows_f32 if dtype is torch.float32 else _rows_bf16, _job(weights, x, out, rows))


def _job(weights: Sequence[torch.Tensor], x: torch.Tensor, out: torch.Tensor, rows: Rows) -> list[int]:
    num_vectors, num_inputs = x.shape
    num_rows, num_outputs = out.shape
    header = [0, len(weights), num_outputs, num_inputs, num_vectors, len(rows.target), num_rows]
    addresses = [weight.data_ptr() for weight in weights]
    return [*header, x.data_ptr(), out.data_ptr(), *addresses, *rows.starts, *rows.source, *rows.target]


def _with_torch(
    x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Rows, out: torch.Tensor, is_transposed: bool
) -> None:
    for weight, start, end in zip(weights, rows.starts, rows.starts[1:], strict=False):
        for n in range(start, end):
            out[rows.target[n]] = torch.mv(weight.T if is_transposed else weight, x[rows.source[n]])
