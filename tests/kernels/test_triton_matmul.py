"""The Triton matrix product for any number of rows, against torch in float64.

Mostly in fp16: the interpreter multiplies no bf16 matrices.
"""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from ropeway.kernels import triton_matmul
from ropeway.kernels.triton_matmul import Tile, steady_linear, tile_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny matrices take several programs and several steps along K."""
    monkeypatch.setattr(triton_matmul, "FEW", (Tile(16, 16, 16, 4, 2),))
    monkeypatch.setattr(triton_matmul, "TILES", (Tile(32, 32, 32, 4, 2), Tile(16, 16, 32, 4, 2)))
    monkeypatch.setattr(triton_matmul, "WIDE", Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(triton_matmul, "PROGRAMS", 6)


def case(rows: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * n + k)
    return tuple(torch.randn(*shape, generator=generator).to(dtype).to(DEVICE) for shape in ((rows, k), (n, k), (n,)))


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = steady_linear(x, weight, bias)
    assert out.dtype == x.dtype and out.shape == expected.shape
    assert (out.double() - expected).norm() / expected.norm() < (5e-3 if x.dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 40, 300])
def test_sizes(rows: int, dtype: torch.dtype) -> None:
    """Guards every tile, sizes that are no multiples of one, and the way programs go through more than eight tiles of
    rows."""
    x, weight, bias = case(rows, 70, 50, dtype)
    check(x, weight, bias)
    check(*case(rows, 33, 64, dtype)[:2], None)


def test_shapes_and_strides() -> None:
    """Guards packed batches [1,N,K], slices of a merged projection's output, turned inputs, and steps without rows."""
    x, weight, bias = case(24, 48, 32)
    check(x.view(2, 3, 4, 32), weight, bias)
    wide = torch.full((24, 90), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 40:72] = x
    check(wide[:, 40:72], weight, None)
    check(x.T.contiguous().T, weight, None)
    assert steady_linear(x[:0], weight, bias).shape == (0, 48)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Guards independence: a row of NaN stays alone, also where lines past the end are copies of the last."""
    x, weight, _ = case(41, 40, 64)
    expected = steady_linear(x, weight, None)
    for lost in (3, 40):
        with_nan = x.clone()
        with_nan[lost] = torch.nan
        out = steady_linear(with_nan, weight, None)
        others = [row for row in range(41) if row != lost]
        assert out[lost].isnan().all() and torch.equal(out[others], expected[others])


def test_the_tile_follows_from_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the matrix unit: tiles that the GPU really gets take at least 64 rows of the weight, and no more rows of x
    than there are, but for powers of two."""
    monkeypatch.undo()
    for rows, outputs in product((1, 16, 17, 33, 64, 100, 200, 256, 257, 5000), (1, 1024, 4096, 28672, 128_256)):
        tile = tile_of(rows, outputs, 2)
        assert tile.outputs >= 64 and tile.rows in (16, 32) if rows <= 32 else tile.rows < 2 * rows
        assert tile_of(rows, outputs, 4) == triton_matmul.WIDE
    assert tile_of(8192, 4096, 2).rows == 128 and tile_of(256, 28672, 2).rows == 256 and tile_of(256, 512, 2).rows == 64
