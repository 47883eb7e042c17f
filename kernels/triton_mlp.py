"""The gate of an MLP on the GPU, in Triton: activation(gate) * up in one launch. Its reference is in `fused_ops.py`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from ropeway.kernels.triton_jit import ceil_div, gdc_launch_dependents, gdc_wait, jit, launch_options, starts_early, tl
from ropeway.kernels.triton_norm import rows_of

BLOCK = 1024
"""Numbers of a row that one program computes."""


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate), rounded to its dtype, times up: [..., I] with rows as in `normalise` -> [..., I], contiguous.

    activation: silu, gelu (by erf) or gelu_tanh (its approximation).
    """
    outer, inner = rows_of(gate)
    up_outer, up_inner = rows_of(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    early = starts_early(gate.device)
    _gated[(outer.size * inner.size, ceil_div(width, BLOCK))](
        *(gate, up, out, inner.size, outer.stride, inner.stride, up_outer.stride, up_inner.stride),
        WIDTH=width,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        EARLY=early,
        **launch_options(early),
        num_warps=4,
    )
    return out


@jit(run_time=("inner",))
def _gated(
    gate,
    up,
    out,
    inner,
    gate_stride_outer,
    gate_stride_inner,
    up_stride_outer,
    up_stride_inner,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    outer = row // inner
    within = row % inner
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(gate + outer * gate_stride_outer + within * gate_stride_inner + column, mask=mask, other=0).to(
        tl.float32
    )
    y = tl.load(up + outer * up_stride_outer + within * up_stride_inner + column, mask=mask, other=0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    x = x.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (x * y).to(out.dtype.element_ty), mask=mask)


@jit()
def _sigmoid(x):
    """1 / (1 + exp(-x)) without an exponential that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)
