"""The Triton matrix products of few rows against torch in float64.

Mostly in fp16: the interpreter multiplies no bf16 matrices.
"""

import pytest
import torch

pytest.importorskip("triton")

from ropeway.kernels import triton_linear
from ropeway.kernels.fp8 import round_to_fp8
from ropeway.kernels.triton_linear import few_rows_linear, round_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(rows: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * n + k)
    return tuple(torch.randn(*shape, generator=generator).to(dtype).to(DEVICE) for shape in ((rows, k), (n, k), (n,)))


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = few_rows_linear(x, weight, bias)
    assert out.dtype == x.dtype
    assert (out.double() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("n", "k"), [(80, 512), (33, 272), (3, 16)])
def test_narrow_weights(rows: int, n: int, k: int) -> None:
    """Guards the tail of a weight whose sizes are no multiples of any tile, and the slices of K."""
    x, weight, _ = case(rows, n, k)
    check(x, weight, None)


@pytest.mark.parametrize("rows", [3, 17, 32])
@pytest.mark.parametrize("k", [144, 128])
def test_wide_weights(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the programs that take K in order, with x padded to 16 and to 32 rows."""
    monkeypatch.setattr(triton_linear, "FEW_OUTPUTS", 100)
    x, weight, bias = case(rows, 140, k)
    check(x, weight, bias)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (5, torch.float16)])
def test_bias_and_dtypes(rows: int, dtype: torch.dtype) -> None:
    """Guards the bias of Qwen2's projections, in either kernel."""
    check(*case(rows, 48, 64, dtype))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_need_not_be_dense(rows: int) -> None:
    """Guards slices of a merged projection's output."""
    x, weight, _ = case(rows, 48, 128)
    wide = torch.full((rows, 300), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 100:228] = x
    check(wide[:, 100:228], weight, None)
    check(x.T.contiguous().T, weight, None)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Guards independence, and padding: a row of NaN stays alone, and others keep their bits."""
    x, weight, _ = case(9, 80, 512)
    expected = few_rows_linear(x, weight, None)
    x[3] = torch.nan
    out = few_rows_linear(x, weight, None)
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert out[3].isnan().all() and torch.equal(out[others], expected[others])
    assert torch.equal(few_rows_linear(x[:2], weight, None), expected[:2])


@pytest.mark.parametrize(("rows", "n"), [(1, 80), (5, 80), (3, 200)])
def test_fp8(rows: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards scales, in every kernel: the numbers that `fp8.py` multiplies on the CPU."""
    monkeypatch.setattr(triton_linear, "FEW_OUTPUTS", 100)
    x, weight, bias = (part.float() for part in case(rows, n, 272))
    x *= torch.logspace(-2, 2, rows, device=DEVICE)[:, None]
    rounded, scale = round_to_fp8(weight)
    found, found_scale = round_to_fp8(x)
    torch.testing.assert_close(
        round_rows(x)[1], found_scale, rtol=1e-6, atol=0
    )  # the interpreter rounds to e4m3 wrongly
    out = few_rows_linear(found, rounded, bias, scales=(found_scale, scale), dtype=torch.float32)
    right = found.float() @ rounded.float().T * found_scale[:, None] * scale + bias
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-3)
