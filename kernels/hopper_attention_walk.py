"""The walk of four warps over the key tiles of 64 pairs; `hopper_attention.py` says what these are."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def weigh(
    score,
    total,
    peak,
    start,
    position,
    scale,
    softcap,
    window,
    BLOCK_N: gl.constexpr,
    SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr,
    MASKED: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """One key tile's scores to weights exp2(score - peak); how much earlier sums shrink, and the sums' new state."""
    if SOFTCAP:
        # softcap * tanh(x), since tanh(x) = 1 - 2 / (exp(2x) + 1); `scale` holds 2 / softcap, both in base 2.
        score = softcap - 2 * softcap / (gl.exp2(score * scale) + 1)
    if MASKED:
        key = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (position[:, None] - key[None, :] < window)
        score = gl.where(visible, score, float("-inf"))
    highest = gl.max(score, 1)
    if not SOFTCAP:
        highest = highest * scale
    new_peak = gl.maximum(peak, highest)
    origin = new_peak
    if MASKED:
        origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    if SOFTCAP:  # noqa: SIM108
        weight = gl.exp2(score - origin[:, None])
    else:
        weight = gl.exp2(score * scale - origin[:, None])
    shrink = gl.exp2(peak - origin)
    return weight, shrink, total * shrink + gl.sum(weight, 1), new_peak


@gluon.jit
def clear(v, start, lowest, highest, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_V: gl.constexpr):
    """Zeros for the values of a page's keys that no token of the tile sees: 0 * NaN of a left-over is NaN.

    Both groups of warps do it: they write the same."""
    THREADS: gl.constexpr = HEAD_V // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    for page in gl.static_range(BLOCK_N // PAGE):
        first = start + page * PAGE
        last = first + PAGE - 1
        if ((first <= highest) & (highest < last)) | ((first < lowest) & (lowest <= last)):
            key = first + gl.arange(0, PAGE, layout=gl.SliceLayout(1, LAYOUT))
            part = v.slice(page * PAGE, PAGE, 0)
            seen = (key <= highest) & (key >= lowest)
            value = part.load(LAYOUT)
            part.store(gl.where(seen[:, None], value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def walk(
    acc,
    total,
    peak,
    weight,
    q,
    k_memory,
    v_memory,
    barriers,
    done,
    turns,
    start,
    count,
    lowest,
    highest,
    position,
    scale,
    softcap,
    window,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_V: gl.constexpr,
    STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr,
    MASKED: gl.constexpr,
    LAYOUT: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
    HALF: gl.constexpr,
):
    """`count` key tiles, from `start` downwards. While the matrix unit adds the values of the tile before, whose
    weights are waiting, the scores of this one become weights. The two groups of warps send their products in turns."""
    k_full, k_empty, v_full, v_empty, turn = barriers
    for back in range(count):
        mbarrier.wait(turn.index(HALF), turns % 2 ^ (1 - HALF))
        stage = (done + 1) % STAGES
        before = done % STAGES
        mbarrier.wait(k_full.index(stage), ((done + 1) // STAGES) % 2)
        score = gl.zeros([64, BLOCK_N], gl.float32, layout=LAYOUT)
        score = warpgroup_mma(q, k_memory.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (done // STAGES) % 2)
        acc = warpgroup_mma(weight, v_memory.index(before), acc, is_async=True)
        mbarrier.arrive(turn.index(1 - HALF), count=1)
        turns += 1
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new, shrink, total, peak = weigh(
            score, total, peak, start - back * BLOCK_N, position, scale, softcap, window,
            BLOCK_N, SOFTCAP, WINDOW, MASKED, LAYOUT,
        )  # fmt: skip
        acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT_LAYOUT))[:, None]
        weight = gl.convert_layout(new.to(weight.dtype), weight.type.layout)
        done += 1
        if WINDOW:  # noqa: SIM102
            if start - back * BLOCK_N < lowest:
                mbarrier.wait(v_full.index(stage), (done // STAGES) % 2)
                clear(v_memory.index(stage), start - back * BLOCK_N, lowest, highest, PAGE, BLOCK_N, HEAD_V)
    return acc, total, peak, weight, done, turns
