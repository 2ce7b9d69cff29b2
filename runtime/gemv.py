"""`gemv`: matrix times a few vectors, for decoding. Reads each weight once, accumulates in float32, rounds once.

Compiled by Numba, which brings its own compiler. At one token the time of an expert is the time to read its weights;
torch's CPU kernels for bfloat16 reach about 60 % of this one's rate there (results/LOG.md). Each row of the result
depends only on its own row of the input, so a token's result does not depend on what it is batched with.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit


@njit(inline="always")
def _widen(bits):  # type: ignore[no-untyped-def]
    """The float32 that a bfloat16's 16 bits are the upper half of."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def _narrow(value):  # type: ignore[no-untyped-def]
    """bfloat16 bits of a float32, rounded to nearest even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


# No `nnan`/`ninf`: an overflowing activation must come out as it does from torch.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _rows_bf16(weight, x, out):  # type: ignore[no-untyped-def]
    """out[r] = weight @ x[r]; weight [n, k] and out [rows, n] as bfloat16 bits, x [rows, k] float32."""
    for i in range(weight.shape[0]):
        for r in range(x.shape[0]):
            total = np.float32(0.0)
            for j in range(weight.shape[1]):
                total += _widen(weight[i, j]) * x[r, j]
            out[r, i] = _narrow(total)


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _rows_f32(weight, x, out):  # type: ignore[no-untyped-def]
    """As `_rows_bf16`, all float32."""
    for i in range(weight.shape[0]):
        for r in range(x.shape[0]):
            total = np.float32(0.0)
            for j in range(weight.shape[1]):
                total += weight[i, j] * x[r, j]
            out[r, i] = total


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _columns_bf16(weight, x, out):  # type: ignore[no-untyped-def]
    """out[r] = x[r] @ weight; weight [k, n] as bfloat16 bits, x [rows, k] and out [rows, n] float32, out zeroed."""
    for i in range(weight.shape[0]):
        for r in range(x.shape[0]):
            for j in range(weight.shape[1]):
                out[r, j] += _widen(weight[i, j]) * x[r, i]


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _columns_f32(weight, x, out):  # type: ignore[no-untyped-def]
    """As `_columns_bf16`, all float32."""
    for i in range(weight.shape[0]):
        for r in range(x.shape[0]):
            for j in range(weight.shape[1]):
                out[r, j] += weight[i, j] * x[r, i]


def gemv_linear(x: torch.Tensor, weight: torch.Tensor, *, is_transposed: bool) -> torch.Tensor:
    """x @ weight.T, or x @ weight if `is_transposed`, without bias.

    Args:
        x: [rows, k]. weight: [n, k], or [k, n] if transposed; contiguous, on the CPU, of the same dtype.

    Returns:
        [rows, n] of the same dtype. bfloat16 and float32 run compiled; other dtypes go through `torch.mv` row by row.
    """
    if weight.dtype not in (torch.bfloat16, torch.float32):
        matrix = weight.T if is_transposed else weight
        return torch.stack([torch.mv(matrix, row) for row in x.to(weight.dtype)])
    wide = x.to(weight.dtype).to(torch.float32).contiguous().numpy()
    if is_transposed:
        out = torch.zeros(x.shape[0], weight.shape[1])
        if weight.dtype is torch.float32:
            _columns_f32(weight.numpy(), wide, out.numpy())
            return out
        _columns_bf16(weight.view(torch.uint16).numpy(), wide, out.numpy())
        return out.to(torch.bfloat16)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype)
    if weight.dtype is torch.float32:
        _rows_f32(weight.numpy(), wide, out.numpy())
    else:
        _rows_bf16(weight.view(torch.uint16).numpy(), wide, out.view(torch.uint16).numpy())
    return out
