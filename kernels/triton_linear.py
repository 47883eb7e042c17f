"""x @ weight.T for few rows on a GPU, in Triton, limited by how fast the weights can be read. Reference: `F.linear`.

Knows tensors only. Two kernels, tilings fixed by the shape alone:

    one row        one program multiplies 2 rows of the weight; its threads share K
    few rows       one program multiplies 64 rows of the weight, K in order; where that makes too few programs, 16
                   rows, K shared by its 4 warps. x is padded to 16 or 32 rows

Nothing is summed across programs, so a result depends on its own row of x, the weight and the kernel: on no
neighbour, and on no order in which programs end.

On GPUs that can, a kernel is launched before the one in front of it has ended (programmatic dependent launch): its
programs start while the last of the other's still run, and wait with the first read of anything that could be new.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from ropeway.kernels.triton_jit import ceil_div, jit, launch_options, starts_early

try:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    tl = None

FEW_OUTPUTS = 4096
"""Below so many rows of the weight, 64 of them per program would leave most of a large GPU idle."""


def max_rows(outputs: int) -> int:
    """Rows of x up to which this pays for a weight of so many rows; beyond, cuBLAS is as fast.

    So it is for 2 rows already where 64 rows per program make more programs than a large GPU runs at once, but not
    many times as many."""
    if outputs < FEW_OUTPUTS:
        return 16
    return 1 if 264 * 64 < outputs < 1024 * 64 else 32


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R,K], 1 <= R <= `max_rows(N)`, weight [N,K] contiguous, bias [N] or None, of one of bf16 and fp16 -> [R,N];
    sums in fp32."""
    assert weight.is_contiguous() and 1 <= x.shape[0] <= max_rows(weight.shape[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, k), n = x.shape, weight.shape[0]
    out = x.new_empty(rows, n)
    early = starts_early(x.device)
    where = (x, weight, weight if bias is None else bias, out, rows, n, k, x.stride(0))
    shared = {"BIAS": bias is not None, "EARLY": early} | launch_options(early)
    if rows == 1 and (k >= 2048 or n < 8192):  # a program with less to read ends before it has paid its start
        _one_row[(ceil_div(n, 2),)](*where, BLOCK_N=2, BLOCK_K=1024, EVEN=k % 1024 == 0, **shared, num_warps=4)
        return out
    slices = 4 if n < FEW_OUTPUTS else 1
    block_n = 64 // slices
    programs = ceil_div(n, block_n)
    _few_rows[(programs,)](
        *where,
        ROWS=16 if rows <= 16 else 32,
        BLOCK_N=block_n,
        BLOCK_K=128,
        SLICES=slices,
        EVEN=k % (128 * slices) == 0,
        **shared,
        num_warps=4,
        num_stages=4 if slices > 1 or programs > 256 else 7,  # bytes on their way: several programs' or one's
    )
    return out


@jit(run_time=("rows",))
def _one_row(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs of the one row: every thread multiplies 8 neighbours of K at a time."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    base = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None, None] * inputs + k
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            w = tl.load(base + start, eviction_policy="evict_first")
            v = tl.load(x + start + k)
        else:
            w = tl.load(base + start, mask=start + k < inputs, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + start + k, mask=start + k < inputs, other=0.0)
        acc += tl.sum(w.to(tl.float32) * v.to(tl.float32), 2)
    result = tl.sum(acc, 1)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < outputs)


@jit(run_time=("rows",))
def _few_rows(
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
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs of all rows, in steps of SLICES * BLOCK_K along K; each slice is a matrix product of its own."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    w_at = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * inputs + k[None, :]
    x_at = x + row[None, :] * x_stride + k[:, None]
    w_inside = k[None, :]
    x_inside = k[:, None]
    real = row[None, :] < rows
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if SLICES > 1:
        piece = tl.arange(0, SLICES)[:, None, None] * BLOCK_K
        w_at = w_at[None] + piece
        x_at = x_at[None] + piece
        w_inside = w_inside[None] + piece
        x_inside = x_inside[None] + piece
        real = real[None]
        acc = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, inputs, SLICES * BLOCK_K):
        if EVEN:
            w = tl.load(w_at + start)
            v = tl.load(x_at + start, mask=real, other=0.0)
        else:
            w = tl.load(w_at + start, mask=start + w_inside < inputs, other=0.0)
            v = tl.load(x_at + start, mask=real & (start + x_inside < inputs), other=0.0)
        acc = tl.dot(w, v, acc)
    result = acc
    if SLICES > 1:
        result = tl.sum(acc, 0)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = out + row[None, :].to(tl.int64) * outputs + n[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row[None, :] < rows) & (n[:, None] < outputs))
