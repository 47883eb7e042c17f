"""RMSNorm and LayerNorm on the GPU, in Triton, alone or with the residual addition before it: one launch, one pass.

Knows rows of numbers, no model. `fused_ops.py` has the reference in torch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from ropeway.kernels.fused_ops import Norm

TILE = 2048
"""Numbers that one program holds at least: as many short rows, though there may be fewer."""


def normalise(x: torch.Tensor, norm: Norm, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * (offset + weight) + bias over the last dimension, of x + residual; a centred x has no mean.

    Args:
        x: [..., D], of at most two leading dimensions that are not 1; any strides but for a dense last dimension.
        norm: its weight and conventions; bias only where it rounds late.
        residual: like x, or None.

    Returns:
        (normed, x + residual rounded to x's dtype or x itself); both [..., D], new ones contiguous.
    """
    tokens, heads = rows_of(x)
    hidden = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    other = x if residual is None else residual
    block = next_power_of_2(hidden)
    rows = max(1, TILE // block)
    early = starts_early(x.device)
    _normalise[(ceil_div(tokens.size * heads.size, rows),)](
        *(x, other, norm.weight, norm.weight if norm.bias is None else norm.bias, out, total),
        *(tokens.size * heads.size, heads.size, norm.eps),
        *(tokens.stride, heads.stride, rows_of(other)[0].stride, rows_of(other)[1].stride),
        HIDDEN=hidden,
        BLOCK=block,
        ROWS=rows,
        RESIDUAL=residual is not None,
        CENTRED=norm.centred,
        OFFSET=norm.offset,
        LATE=norm.late,
        BIAS=norm.bias is not None,
        EARLY=early,
        **launch_options(early),
        num_warps=max(1, min(16, rows * block // 512)),
    )
    return out, total


class Dimension:
    """Size and stride of one dimension, in numbers."""

    __slots__ = ("size", "stride")

    def __init__(self, size: int, stride: int) -> None:
        self.size = size
        self.stride = stride


def rows_of(x: torch.Tensor) -> tuple[Dimension, Dimension]:
    """The leading dimensions of x [..., D] as (outer, inner), those that follow each other in memory taken together.

    Raises:
        ValueError: two do not suffice, or the last dimension is not dense.
    """
    found: list[Dimension] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if found and found[-1].stride == size * stride:
            found[-1] = Dimension(found[-1].size * size, stride)
        elif size != 1:
            found.append(Dimension(size, stride))
    if len(found) > 2 or x.stride(-1) != 1:
        raise ValueError(f"rows of a tensor {list(x.shape)} with strides {list(x.stride())}")
    outer, inner = [Dimension(1, 0)] * (2 - len(found)) + found
    return outer, inner


@jit(run_time=("rows", "inner"))
def _normalise(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    rows,
    inner,
    eps,
    x_stride_outer,
    x_stride_inner,
    r_stride_outer,
    r_stride_inner,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    LATE: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows, whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < HIDDEN)
    place = row * HIDDEN + column
    here = (row // inner) * x_stride_outer + (row % inner) * x_stride_inner + column
    scale = tl.load(weight + column, mask=column < HIDDEN, other=0).to(tl.float32)
    if EARLY:  # the weight is always there
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + here, mask=mask, other=0).to(tl.float32)
    if RESIDUAL:
        here = (row // inner) * r_stride_outer + (row % inner) * r_stride_inner + column
        value += tl.load(residual + here, mask=mask, other=0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if CENTRED:
        value = tl.where(mask, value - tl.sum(value, axis=1, keep_dims=True) / HIDDEN, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / HIDDEN + eps)
    if not LATE:
        value = value.to(out.dtype.element_ty).to(tl.float32)
    value *= OFFSET + scale
    if BIAS:
        value += tl.load(bias + column, mask=column < HIDDEN, other=0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
