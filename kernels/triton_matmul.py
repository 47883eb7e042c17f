"""x @ weight.T on a GPU, in Triton, with the same bits for a row of x whatever the other rows, and however many.

The reference is `F.linear`. Knows tensors only.

One program multiplies BLOCK_N rows of the weight with ROWS rows of x, all of K in one order: the matrix unit adds K in
steps of 16 to one fp32 sum per output, from first to last (fp32 inputs: one multiply-add per number). So a tile's size
decides nothing about an output, and may follow from the number of rows; the weight always stands on the left, in tiles
of at least 64 rows, so that it is always the same instruction. Nothing is summed across programs.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch

from ropeway.kernels.triton_jit import ceil_div, gdc_launch_dependents, gdc_wait, jit, launch_options, starts_early, tl


@dataclass(slots=True, frozen=True)
class Tile:
    """What one program computes, and what Triton makes of it."""

    outputs: int
    """Rows of the weight."""
    rows: int
    """Rows of x."""
    inputs: int
    """Numbers of K that are in flight together."""
    warps: int
    stages: int


TILES = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(64, 128, 64, 4, 5), Tile(64, 64, 128, 4, 4))
"""Of two bytes per number, the largest first."""
FEW = (Tile(64, 16, 128, 4, 7), Tile(64, 32, 128, 4, 7))
"""The same for so few rows that reading the weight decides."""
WIDE = Tile(64, 32, 32, warps=4, stages=3)
"""Of four bytes per number."""
PROGRAMS = 96
"""Most of a large GPU's multiprocessors: tiles are made smaller until there are so many programs, if there can be."""


def tile_of(rows: int, outputs: int, itemsize: int) -> Tile:
    """The tile for so many rows of x and of the weight."""
    if itemsize == 4:
        return WIDE
    for tile in FEW:
        if rows <= tile.rows:
            return tile
    for tile in TILES if rows <= TILES[0].rows else TILES[1:]:  # the first where it reads the weight once
        if rows > tile.rows // 2 and ceil_div(rows, tile.rows) * ceil_div(outputs, tile.outputs) >= PROGRAMS:
            return tile
    return TILES[-1]


def steady_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K], weight [N,K] contiguous, bias [N] or None, all of one of bf16, fp16 and fp32 -> [..., N].

    Sums in fp32, products of fp32 not rounded to tf32."""
    assert weight.is_contiguous() and x.dtype == weight.dtype and x.dtype.itemsize in (2, 4)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = flat.new_empty(len(flat), len(weight))
    if len(flat):
        _launch(flat, weight, bias, out, tile_of(len(flat), len(weight), x.element_size()))
    return out.view(*x.shape[:-1], len(weight))


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile) -> None:
    (rows, k), n = x.shape, len(weight)
    early = starts_early(x.device)
    _multiply[(ceil_div(rows, tile.rows) * ceil_div(n, tile.outputs),)](
        *(x, weight, weight if bias is None else bias, out, rows, n, k, x.stride(0)),
        ROWS=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        EVEN=k % tile.inputs == 0,
        BIAS=bias is not None,
        EARLY=early,
        **launch_options(early),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@jit(run_time=("rows",))
def _multiply(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile. Programs go through the rows of eight tiles of x before the next rows of the weight, for the L2's sake.

    Lines past the end of x or weight are copies of the last: what comes of them is not stored."""
    across = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // (8 * tl.cdiv(outputs, BLOCK_N))
    height = tl.minimum(across - group * 8, 8)
    within = tl.program_id(0) % (8 * tl.cdiv(outputs, BLOCK_N))
    row = (group * 8 + within % height) * ROWS + tl.arange(0, ROWS)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * inputs + k[None, :]
    x_at = x + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            w = tl.load(w_at)
            v = tl.load(x_at)
        else:
            w = tl.load(w_at, mask=start + k[None, :] < inputs, other=0.0)
            v = tl.load(x_at, mask=start + k[:, None] < inputs, other=0.0)
        acc = tl.dot(w, v, acc, input_precision="ieee")
        w_at += BLOCK_K
        x_at += BLOCK_K
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = out + row[:, None].to(tl.int64) * outputs + n[None, :]
    result = tl.trans(acc.to(out.dtype.element_ty))
    tl.store(at, result, mask=(row[:, None] < rows) & (n[None, :] < outputs))
