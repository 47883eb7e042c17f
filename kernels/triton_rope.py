"""Rotary embedding and KV write on the GPU, in Triton: q and k rotated, k and v stored in the pool, in one launch.

Where a model normalises each head of q and k before it rotates them, that happens in the same pass. The tables of cos
and sin are a launch per forward. Knows tokens, heads and slots, no model. `fused_ops.py` has the reference in torch.

    one program     one token, BLOCK_H heads: of q first, then of k and v together
    pair i          numbers i and PAIRS + i of a head (half-split), or 2 i and 2 i + 1 (interleaved)
    the rest        numbers [2 * PAIRS, HEAD) of a head pass through
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ropeway.kernels.fp8_cache import Scales
from ropeway.kernels.triton_cache import store_number
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
    from ropeway.kernels.fused_ops import Frequencies, Rotation, Unrotated

BLOCK_H = 8
"""Heads of one program: few, so that a single token still fills some multiprocessors."""


def rotate_and_write(
    q: Unrotated,
    k: Unrotated,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation: Rotation,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scales: Scales = Scales(),  # noqa: B008  # frozen
) -> torch.Tensor:
    """As `fused_ops.rotate_and_write`; the last dimension of q, k and v is dense, q and k share what their norms do."""
    tokens, q_heads, head = q.x.shape
    kv_heads, head_v = v.shape[1:]
    assert q.x.stride(2) == k.x.stride(2) == v.stride(2) == 1
    out = torch.empty(tokens, q_heads, head, dtype=q.x.dtype, device=q.x.device)
    rest = head - 2 * rotation.pairs
    early = starts_early(v.device)
    norms = (q.norm, k.norm)
    q_weight, k_weight = (cos if norm is None else norm.weight for norm in norms)
    _rotate_and_write[(tokens, ceil_div(q_heads, BLOCK_H) + ceil_div(kv_heads, BLOCK_H))](
        *(q.x, k.x, v, out, k_pool, v_pool, slots, cos, sin, q_weight, k_weight),
        *(1 / scales.k, 1 / scales.v, 0.0 if q.norm is None else q.norm.eps),
        *(q.x.stride(0), q.x.stride(1), k.x.stride(0), k.x.stride(1), v.stride(0), v.stride(1)),
        *(cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1)),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD=head,
        HEAD_V=head_v,
        PAIRS=rotation.pairs,
        STEP=rotation.step,
        INTERLEAVED=rotation.interleaved,
        NORM=q.norm is not None,
        OFFSET=0.0 if q.norm is None else q.norm.offset,
        LATE=q.norm is not None and q.norm.late,
        BLOCK_H=BLOCK_H,
        BLOCK_P=next_power_of_2(rotation.pairs),
        BLOCK_R=0 if rest == 0 else next_power_of_2(rest),
        BLOCK_V=next_power_of_2(head_v),
        EARLY=early,
        **launch_options(early),
        num_warps=2,
    )
    return out


def angle_tables(
    positions: torch.Tensor, frequencies: Frequencies, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused_ops.angle_tables`."""
    positions = positions.contiguous()
    shape = *positions.shape, frequencies.width
    cos, sin = (torch.empty(shape, dtype=dtype, device=positions.device) for _ in range(2))
    _angle_tables[(positions.numel(),)](
        *(positions, frequencies.inverse, cos, sin, frequencies.scaling),
        PAIRS=len(frequencies.inverse),
        WIDTH=frequencies.width,
        REPEATED=frequencies.layout == "repeated",
        BLOCK=next_power_of_2(frequencies.width),
        num_warps=1,
    )
    return cos, sin


@jit(run_time=("positions",))
def _angle_tables(
    positions,
    inverse,
    cos,
    sin,
    scaling,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    REPEATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's row of both tables."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    pair = column // 2 if REPEATED else column % PAIRS
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inverse + pair, mask=mask, other=0)
    here = token * WIDTH + column
    tl.store(cos + here, (tl.cos(angle) * scaling).to(cos.dtype.element_ty), mask=mask)
    tl.store(sin + here, (tl.sin(angle) * scaling).to(sin.dtype.element_ty), mask=mask)


@jit(run_time=("slots",))
def _rotate_and_write(
    q,
    k,
    v,
    out,
    k_pool,
    v_pool,
    slots,
    cos,
    sin,
    q_weight,
    k_weight,
    k_factor,
    v_factor,
    eps,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    cos_stride_token,
    cos_stride_column,
    sin_stride_token,
    sin_stride_column,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token, BLOCK_H heads."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, BLOCK_P)[None, :]
    cosine = tl.load(cos + token * cos_stride_token + pair * STEP * cos_stride_column, mask=pair < PAIRS, other=0)
    sine = tl.load(sin + token * sin_stride_token + pair * STEP * sin_stride_column, mask=pair < PAIRS, other=0)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    if block < q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        source = q + token * q_stride_token + head * q_stride_head
        target = out + (token * Q_HEADS + head) * HEAD
        _rotate(
            source,
            target,
            head < Q_HEADS,
            cosine,
            sine,
            q_weight,
            1.0,
            eps,
            HEAD,
            PAIRS,
            INTERLEAVED,
            NORM,
            OFFSET,
            LATE,
            BLOCK_P,
            BLOCK_R,
        )
    else:
        head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        slot = tl.load(slots + token)
        source = k + token * k_stride_token + head * k_stride_head
        stored = k_pool + (slot * KV_HEADS + head) * HEAD  # of another type than `target`
        _rotate(
            source,
            stored,
            head < KV_HEADS,
            cosine,
            sine,
            k_weight,
            k_factor,
            eps,
            HEAD,
            PAIRS,
            INTERLEAVED,
            NORM,
            OFFSET,
            LATE,
            BLOCK_P,
            BLOCK_R,
        )
        dim = tl.arange(0, BLOCK_V)[None, :]
        mask = (head < KV_HEADS) & (dim < HEAD_V)
        new = tl.load(v + token * v_stride_token + head * v_stride_head + dim, mask=mask)
        store_number(v_pool + (slot * KV_HEADS + head) * HEAD_V + dim, new, v_factor, mask)


@jit()
def _rotate(
    source,
    target,
    inside,
    cosine,
    sine,
    weight,
    factor,
    eps,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Heads from `source` [BLOCK_H,1] to `target`, normalised if NORM, rotated, rounded to the source's dtype."""
    kind = source.dtype.element_ty
    pair = tl.arange(0, BLOCK_P)[None, :]
    if INTERLEAVED:
        left = pair * 2
        right = left + 1
    else:
        left = pair
        right = pair + PAIRS
    mask = inside & (pair < PAIRS)
    a = tl.load(source + left, mask=mask, other=0).to(tl.float32)
    b = tl.load(source + right, mask=mask, other=0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, axis=1, keep_dims=True)
        if BLOCK_R > 0:
            rest = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]
            c = tl.load(source + rest, mask=inside & (rest < HEAD), other=0).to(tl.float32)
            squares += tl.sum(c * c, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / HEAD + eps)
        a = _weighted(a * scale, weight + left, pair < PAIRS, source, OFFSET, LATE)
        b = _weighted(b * scale, weight + right, pair < PAIRS, source, OFFSET, LATE)
    store_number(target + left, (a * cosine - b * sine).to(kind), factor, mask)
    store_number(target + right, (b * cosine + a * sine).to(kind), factor, mask)
    if BLOCK_R > 0:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]
        mask = inside & (rest < HEAD)
        c = tl.load(source + rest, mask=mask, other=0).to(tl.float32)
        if NORM:
            c = _weighted(c * scale, weight + rest, rest < HEAD, source, OFFSET, LATE)
        store_number(target + rest, c.to(kind), factor, mask)


@jit()
def _weighted(x, weight, inside, source, OFFSET: tl.constexpr, LATE: tl.constexpr):
    """x * (OFFSET + weight) rounded to the source's dtype, before the weight too unless LATE; as fp32."""
    scale = tl.load(weight, mask=inside, other=0).to(tl.float32)
    if not LATE:
        x = x.to(source.dtype.element_ty).to(tl.float32)
    return (x * (OFFSET + scale)).to(source.dtype.element_ty).to(tl.float32)
