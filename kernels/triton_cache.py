"""Writing and copying KV blocks on the GPU, in Triton: what `KVPool.write` and `KVPool.copy_blocks` do in torch.

Knows slots and blocks, not rows. One launch writes K and V of a layer, two copy blocks in all layers
of one size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch

from ropeway.kernels.fp8 import FP8
from ropeway.kernels.fp8_cache import Scales
from ropeway.kernels.triton_jit import ceil_div, jit, next_power_of_2, tl, upload

COPY_WORDS = 1024
"""Words of a block that one program copies."""


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: Scales = Scales(),  # noqa: B008  # frozen
) -> None:
    """Store new tokens: pools [num_blocks,block_size,Hkv,D] and [..,Dv], contiguous; slots [N] int64; k [N,Hkv,D] and
    v [N,Hkv,Dv] of the pools' dtype or, with the layer's scales, for pools in FP8; any strides. Tokens of one slot
    (padding) write in any order."""
    assert k_pool.is_contiguous() and v_pool.is_contiguous()
    assert k_pool.dtype in (k.dtype, FP8) and v_pool.dtype in (v.dtype, FP8)
    heads, head, head_v = *k.shape[1:], v.shape[2]
    _write[(slots.shape[0],)](
        *(k_pool, v_pool, slots, k, v, *k.stride(), *v.stride(), 1 / scales.k, 1 / scales.v),
        HEADS=heads,
        HEAD=head,
        HEAD_V=head_v,
        BLOCK_H=next_power_of_2(heads),
        BLOCK_D=next_power_of_2(max(head, head_v)),
        num_warps=2,
    )


def copy_blocks(pools: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copy blocks within every pool: pools [num_blocks,...] contiguous; pairs [C,2] int32 (source, destination), C > 0;
    all sources are read before any destination is written. Words have 8 bytes, or 1 where those do not fill a block."""
    by_size: dict[int, list[int]] = {}
    for pool in pools:
        assert pool.is_contiguous()
        by_size.setdefault(pool[0].nbytes, []).append(pool.data_ptr())
    for size, addresses in by_size.items():
        word = torch.int64 if size % 8 == 0 else torch.uint8
        words = size // word.itemsize
        bases = upload(torch.tensor(addresses), pairs.device)
        grid = (ceil_div(words, COPY_WORDS), len(addresses), pairs.shape[0])
        staged = torch.empty(*grid[1:], words, dtype=word, device=pairs.device)
        for gather in (True, False):
            _copy[grid](bases, staged, pairs, WORDS=words, BLOCK=COPY_WORDS, GATHER=gather)


@jit()
def store_number(at, x, factor, mask):
    """x to `at`, as `fp8_cache.rounded` says if that is FP8: `factor` is 1 / scale."""
    if at.dtype.element_ty == tl.float8e4nv:
        x = x.to(tl.float32) * factor
        x = tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, -448.0), 448.0), float("nan"))
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@jit()
def _write(
    k_pool,
    v_pool,
    slots,
    k,
    v,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    k_factor,
    v_factor,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token's K and V, all heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS) & (dim < HEAD)
    new = tl.load(k + token * k_stride_token + head * k_stride_head + dim * k_stride_dim, mask=mask)
    store_number(k_pool + (slot * HEADS + head) * HEAD + dim, new, k_factor, mask)
    mask = (head < HEADS) & (dim < HEAD_V)
    new = tl.load(v + token * v_stride_token + head * v_stride_head + dim * v_stride_dim, mask=mask)
    store_number(v_pool + (slot * HEADS + head) * HEAD_V + dim, new, v_factor, mask)


@jit()
def _copy(addresses, staged, pairs, WORDS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """A piece of one pair's block in one pool: from the source to `staged` if GATHER, else from there on."""
    pool = tl.program_id(1)
    pair = tl.program_id(2)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = word < WORDS
    base = tl.load(addresses + pool).to(staged.dtype)
    here = staged + (pool * tl.num_programs(2) + pair).to(tl.int64) * WORDS + word
    if GATHER:
        there = base + tl.load(pairs + pair * 2).to(tl.int64) * WORDS + word
        tl.store(here, tl.load(there, mask=inside), mask=inside)
    else:
        there = base + tl.load(pairs + pair * 2 + 1).to(tl.int64) * WORDS + word
        tl.store(there, tl.load(here, mask=inside), mask=inside)
