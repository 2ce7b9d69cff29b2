"""The matrix-vector kernel against float64, and its promises about rounding and batching."""

from __future__ import annotations

import pytest
import torch

from runtime.gemv import Rows, gemv


def gemv_linear(x: torch.Tensor, weight: torch.Tensor, *, is_transposed: bool) -> torch.Tensor:
    every = list(range(len(x)))
    out = weight.new_empty(len(x), weight.shape[1 if is_transposed else 0])
    gemv(x, [weight], Rows([0, len(x)], every, every), out, is_transposed=is_transposed)
    return out


def _case(dtype: torch.dtype, rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = torch.randn(*((96, 40) if transposed else (40, 96)), generator=generator).to(dtype)
    return x, weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_close_to_float64(dtype: torch.dtype, rows: int, transposed: bool) -> None:
    x, weight = _case(dtype, rows, transposed)
    exact = x.double() @ (weight.double() if transposed else weight.double().T)
    found = gemv_linear(x, weight, is_transposed=transposed)
    assert found.dtype == dtype and found.shape == exact.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-9}[dtype]
    assert ((found.double() - exact).abs() <= tolerance * exact.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_what_it_is_batched_with(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = _case(dtype, 5, transposed)
    together = gemv_linear(x, weight, is_transposed=transposed)
    alone = torch.cat([gemv_linear(row[None], weight, is_transposed=transposed) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("transposed", [False, True])
def test_without_openmp_it_runs_alone_and_gives_the_same(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    x, weight = _case(torch.bfloat16, 3, transposed)
    shared = gemv_linear(x, weight, is_transposed=transposed)
    monkeypatch.setattr("runtime.gemv._openmp", lambda: None)
    assert torch.equal(gemv_linear(x, weight, is_transposed=transposed), shared)


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_infinities_and_nan() -> None:
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.0e38, -0.0, float("inf"), float("-inf"), float("nan")])
    # One row of weights per value: value = (its bfloat16 part) * 1 + (the rest) * 1, summed in float32.
    high = values.to(torch.bfloat16)
    rest = torch.where(values.isfinite(), values - high.float(), torch.zeros(())).to(torch.bfloat16)
    weight = torch.stack([high, rest], dim=1).contiguous()
    found = gemv_linear(torch.ones(1, 2, dtype=torch.bfloat16), weight, is_transposed=False)[0]
    expected = (high.float() + rest.float()).to(torch.bfloat16)
    assert torch.equal(found[:-1], expected[:-1]) and bool(found[-1].isnan())
