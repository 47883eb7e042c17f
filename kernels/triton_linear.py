"""x @ weight.T for few rows on a GPU, in Triton, limited by how fast the weights can be read.

The reference is `F.linear`; where x and weight are e4m3, `fp8.py`.

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

from ropeway.kernels.triton_jit import (
    ceil_div,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    starts_early,
    tl,
)

FEW_OUTPUTS = 4096
"""Below so many rows of the weight, 64 of them per program would leave most of a large GPU idle."""


def max_rows(outputs: int, dtype: torch.dtype) -> int:
    """Rows of x up to which this pays for a weight of so many rows; beyond, cuBLAS is as fast.

    So it is for 2 rows of bf16 and fp16 already where 64 rows per program make more programs than a large GPU runs at
    once, but not many times as many."""
    if outputs < FEW_OUTPUTS:
        return 16
    return 1 if 264 * 64 < outputs < 1024 * 64 and dtype.itemsize > 1 else 32


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [R,K], 1 <= R <= `max_rows`, weight [N,K] contiguous, bias [N] or None -> [R,N]; sums in fp32.

    All of one of bf16 and fp16; or x and weight of e4m3, with scales [R] and [N] in fp32, which multiply the sums, and
    the dtype of the result."""
    assert weight.is_contiguous() and 1 <= x.shape[0] <= max_rows(weight.shape[0], weight.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, k), n = x.shape, weight.shape[0]
    out = x.new_empty(rows, n, dtype=dtype)
    x_scale, w_scale = (x, x) if scales is None else scales
    early = starts_early(x.device)
    where = (x, weight, weight if bias is None else bias, out, x_scale, w_scale, rows, n, k, x.stride(0))
    shared = {"SCALED": scales is not None, "BIAS": bias is not None, "EARLY": early} | launch_options(early)
    wide = 16 // weight.element_size()  # numbers in 16 bytes
    if rows == 1 and (k >= 2048 or n < 8192):  # a program with less to read ends before it has paid its start
        _one_row[(ceil_div(n, 2),)](
            *where, BLOCK_N=2, VECTOR=wide, BLOCK_K=128 * wide, EVEN=k % (128 * wide) == 0, **shared, num_warps=4
        )
        return out
    slices = 4 if n < FEW_OUTPUTS else 1
    block_n = 64 // slices
    programs = ceil_div(n, block_n)
    _few_rows[(programs,)](
        *where,
        ROWS=16 if rows <= 16 else 32,
        BLOCK_N=block_n,
        BLOCK_K=16 * wide,
        SLICES=slices,
        EVEN=k % (16 * wide * slices) == 0,
        **shared,
        num_warps=4,
        num_stages=4 if slices > 1 or programs > 256 else 7,  # bytes on their way: several programs' or one's
    )
    return out


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8.round_to_fp8` in one launch: x [R,K] -> e4m3 [R,K], scales [R] fp32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rounded = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = x.new_empty(len(x), dtype=torch.float32)
    early = starts_early(x.device)
    _round[(len(x),)](
        *(x, rounded, scale, x.shape[1], x.stride(0)),
        BLOCK=min(8192, next_power_of_2(x.shape[1])),
        EARLY=early,
        num_warps=8,
        **launch_options(early),
    )
    return rounded, scale


@jit()
def _round(x, rounded, scale, inputs, x_stride, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        largest = tl.maximum(
            largest, tl.abs(tl.load(x + row * x_stride + k, mask=k < inputs, other=0.0).to(tl.float32))
        )
    factor = tl.maximum(
        tl.div_rn(tl.max(largest, 0) + tl.zeros([1], tl.float32), 448.0 + tl.zeros([1], tl.float32)), 1e-12
    )
    tl.store(scale + row + tl.arange(0, 1), factor)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + k, mask=k < inputs, other=0.0).to(tl.float32)
        v = tl.div_rn(v, tl.zeros_like(v) + factor)
        v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))
        tl.store(rounded + row * inputs + k, v.to(rounded.dtype.element_ty), mask=k < inputs)


@jit(run_time=("rows",))
def _one_row(
    x,
    weight,
    bias,
    out,
    x_scale,
    w_scale,
    rows,
    outputs,
    inputs,
    x_stride,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs of the one row: every thread multiplies VECTOR neighbours of K at a time."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K // VECTOR)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    base = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None, None] * inputs + k
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            w = tl.load(base + start, eviction_policy="evict_first")
            v = tl.load(x + start + k)
        else:
            w = tl.load(base + start, mask=start + k < inputs, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + start + k, mask=start + k < inputs, other=0.0)
        acc += tl.sum(w.to(tl.float32) * v.to(tl.float32), 2)
    result = tl.sum(acc, 1)
    if SCALED:
        result *= tl.load(w_scale + n, mask=n < outputs, other=0.0) * tl.load(x_scale)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < outputs)


@jit(run_time=("rows",))
def _few_rows(
    x,
    weight,
    bias,
    out,
    x_scale,
    w_scale,
    rows,
    outputs,
    inputs,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
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
        if SLICES == 1:
            # The matrix unit sums e4m3 products with few bits; longer sums than this leave it.
            acc = tl.dot(w, v, acc, max_num_imprecise_acc=128)
        elif SCALED:  # every e4m3 number is one of fp16 too
            acc = tl.dot(w.to(tl.float16), v.to(tl.float16), acc)
        else:
            acc = tl.dot(w, v, acc)
    result = acc
    if SLICES > 1:
        result = tl.sum(acc, 0)
    if SCALED:
        result *= tl.load(w_scale + n, mask=n < outputs, other=0.0)[:, None]
        result *= tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = out + row[None, :].to(tl.int64) * outputs + n[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row[None, :] < rows) & (n[:, None] < outputs))
