"""The device code of `hopper_attention.py`, which says what a tile is and who of a program's warps does what."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ropeway.kernels.hopper_attention_walk import clear, walk, weigh

# Their names in later versions of Triton, and in 3.6.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_elements = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _item(tiles, number, items, KV_HEADS: gl.constexpr):
    """This program's work of that number: row, first token, tokens (0: there is no more), first position, KV head.

    Every other round goes through the programs backwards, so that nobody always gets the longest of a round."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if number % 2 == 1:
        place = programs - 1 - place
    item = number * programs + place
    there = item < items
    at = tiles + item // KV_HEADS * 4
    row = gl.load(at, mask=there, other=0)
    first = gl.load(at + 1, mask=there, other=0)
    tokens = gl.load(at + 2, mask=there, other=0)
    position = gl.load(at + 3, mask=there, other=0)
    return row, first, tokens, position, item % KV_HEADS


@gluon.jit
def _keys_of(position, tokens, window, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """The lowest and highest key that a tile's tokens see; where the first of their key tiles begins; how many."""
    highest = position + tokens - 1
    lowest = position * 0
    if WINDOW:
        lowest = gl.maximum(position - window + 1, 0)
    begin = lowest // BLOCK_N * BLOCK_N
    count = gl.maximum((highest + BLOCK_N - begin) // BLOCK_N, 1)
    return lowest, highest, begin, count


@gluon.jit
def _slots(
    table,
    start,
    lowest,
    highest,
    outside,
    BLOCK_SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The first slot of each page of a key tile; `outside` for one that no token sees."""
    slots = ()
    for page in gl.static_range(BLOCK_N // PAGE):
        key = start + page * PAGE
        seen = (key <= highest) & (key + PAGE > lowest)
        block = gl.load(table + key // BLOCK_SIZE, mask=seen, other=0)
        slots = slots + (gl.where(seen, block * BLOCK_SIZE + key % BLOCK_SIZE, outside),)  # noqa: RUF005
    return slots


@gluon.jit
def _produce(
    tiles,
    items,
    desc,
    memory,
    full,
    empty,
    block_table,
    table_stride,
    window,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Keeps K, or V, of the coming key tiles on their way."""
    HEAD: gl.constexpr = desc.block_type.shape[1]
    outside = desc.shape[0]  # what lies behind the pool comes as zeros
    number = 0
    done = 0
    row, _first, tokens, position, kv_head = _item(tiles, number, items, KV_HEADS)
    while tokens > 0:
        lowest, highest, begin, count = _keys_of(position, tokens, window, BLOCK_N, WINDOW)
        table = block_table + row.to(gl.int64) * table_stride
        column = kv_head * HEAD
        number += 1
        row, _first, tokens, position, kv_head = _item(tiles, number, items, KV_HEADS)  # early: nobody waits for it
        start = begin + (count - 1) * BLOCK_N
        slots = _slots(table, start, lowest, highest, outside, BLOCK_SIZE, PAGE, BLOCK_N)
        for _ in range(count):
            now = slots
            start -= BLOCK_N
            slots = _slots(table, start, lowest, highest, outside, BLOCK_SIZE, PAGE, BLOCK_N)
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES) % 2 ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N * HEAD * (desc.dtype.primitive_bitwidth // 8))
            for page in gl.static_range(BLOCK_N // PAGE):
                part = memory.index(stage).slice(page * PAGE, PAGE, 0)
                load_box(desc, [now[page], column], full.index(stage), part)
            done += 1


@gluon.jit
def _send_queries(
    q_at,
    memory,
    first,
    tokens,
    kv_head,
    stride_token,
    stride_head,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD: gl.constexpr,
):
    """Send for the queries of 64 pairs of a tile."""
    THREADS: gl.constexpr = HEAD // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    pair = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    offset = (first + token).to(gl.int64) * stride_token + head * stride_head
    at = q_at + offset[:, None] + gl.arange(0, HEAD, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    there = (token < tokens)[:, None] & gl.full([64, HEAD], 1, gl.int1, layout=LAYOUT)
    load_elements(memory, at, mask=there)
    async_copy.commit_group()


@gluon.jit
def _consume(
    tiles,
    items,
    q_at,
    out,
    sinks,
    q_memory,
    k_memory,
    v_memory,
    barriers,
    q_stride_token,
    q_stride_head,
    scale,
    softcap,
    window,
    HALF: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD: gl.constexpr,
    HEAD_V: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr,
    SINKS: gl.constexpr,
):
    """64 of the tile's 128 pairs of token and head, by four warps."""
    LOG2E: gl.constexpr = 1.4426950408889634
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_V, 16])
    WEIGHT_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_LAYOUT, k_width=2)
    k_full, k_empty, v_full, v_empty, _turn = barriers
    factor = scale * LOG2E
    if SOFTCAP:
        factor = 2 * scale * LOG2E / softcap
    cap = softcap * LOG2E
    number = 0
    done = 0
    turns = 0
    _row, first, tokens, first_position, kv_head = _item(tiles, number, items, KV_HEADS)
    _send_queries(
        q_at, q_memory.index(HALF), first, tokens, kv_head, q_stride_token, q_stride_head, HALF, GROUP, HEAD
    )  # fmt: skip
    while tokens > 0:
        q = q_memory.index(number % QUERIES * 2 + HALF)
        number += 1
        _row, next_first, next_tokens, next_position, next_kv_head = _item(tiles, number, items, KV_HEADS)
        lowest, highest, begin, count = _keys_of(first_position, tokens, window, BLOCK_N, WINDOW)
        async_copy.wait_group(0)
        fence_async_shared()

        pair = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        position = first_position + pair // GROUP
        total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, LAYOUT))
        acc = gl.zeros([64, HEAD_V], gl.float32, layout=OUT_LAYOUT)

        # From the last key tile, which every token of the tile may see a part of, downwards.
        start = begin + (count - 1) * BLOCK_N
        stage = done % STAGES
        phase = (done // STAGES) % 2
        mbarrier.wait(k_full.index(stage), phase)
        score = gl.zeros([64, BLOCK_N], gl.float32, layout=LAYOUT)
        score = warpgroup_mma(q, k_memory.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new, shrink, total, peak = weigh(
            score, total, peak, start, position, factor, cap, window, BLOCK_N, SOFTCAP, WINDOW, True, LAYOUT
        )
        weight = gl.convert_layout(new.to(q_at.dtype.element_ty), WEIGHT_LAYOUT)
        if QUERIES > 1:
            _send_queries(
                q_at, q_memory.index(number % QUERIES * 2 + HALF), next_first, next_tokens, next_kv_head,
                q_stride_token, q_stride_head, HALF, GROUP, HEAD,
            )  # fmt: skip
        mbarrier.wait(v_full.index(stage), phase)
        clear(v_memory.index(stage), start, lowest, highest, PAGE, BLOCK_N, HEAD_V)

        masked = count - 1
        if not WINDOW:
            # Tiles with keys past the first token: its own, where the tile's tokens lie on both sides of a border.
            masked = gl.minimum(masked, (start - first_position - 1 + BLOCK_N) // BLOCK_N)
            masked = gl.maximum(masked, 0)
        acc, total, peak, weight, done, turns = walk(
            acc, total, peak, weight, q, k_memory, v_memory, barriers, done, turns, start - BLOCK_N, masked,
            lowest, highest, position, factor, cap, window,
            PAGE, BLOCK_N, HEAD_V, STAGES, SOFTCAP, WINDOW, True, LAYOUT, OUT_LAYOUT, HALF,
        )  # fmt: skip
        if not WINDOW:
            acc, total, peak, weight, done, turns = walk(
                acc, total, peak, weight, q, k_memory, v_memory, barriers, done, turns, start - (1 + masked) * BLOCK_N,
                count - 1 - masked, lowest, highest, position, factor, cap, window,
                PAGE, BLOCK_N, HEAD_V, STAGES, SOFTCAP, WINDOW, False, LAYOUT, OUT_LAYOUT, HALF,
            )  # fmt: skip
        stage = done % STAGES
        mbarrier.wait(v_full.index(stage), (done // STAGES) % 2)
        acc = warpgroup_mma(weight, v_memory.index(stage), acc, is_async=True)
        if QUERIES == 1:
            _send_queries(
                q_at, q_memory.index(number % QUERIES * 2 + HALF), next_first, next_tokens, next_kv_head,
                q_stride_token, q_stride_head, HALF, GROUP, HEAD,
            )  # fmt: skip
        acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
        mbarrier.arrive(v_empty.index(stage), count=1)
        done += 1

        pair = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT_LAYOUT))
        token = pair // GROUP
        head = kv_head * GROUP + pair % GROUP
        real = token < tokens
        total = gl.convert_layout(total, gl.SliceLayout(1, OUT_LAYOUT))
        if SINKS:
            peak = gl.convert_layout(peak, gl.SliceLayout(1, OUT_LAYOUT))
            sink = gl.load(sinks + head, mask=real, other=0.0).to(gl.float32) * LOG2E
            upper = gl.maximum(peak, sink)
            shrink = gl.exp2(peak - upper)
            total = total * shrink + gl.exp2(sink - upper)
            acc = acc * shrink[:, None]
        result = acc * (1.0 / gl.where(total == 0, 1.0, total))[:, None]
        at = ((first + token).to(gl.int64) * (KV_HEADS * GROUP) + head) * HEAD_V
        dim = gl.arange(0, HEAD_V, layout=gl.SliceLayout(0, OUT_LAYOUT))
        gl.store(out + at[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=real[:, None])
        first, tokens, first_position, kv_head = next_first, next_tokens, next_position, next_kv_head


@gluon.jit(do_not_specialize=["items", "table_stride", "window"])
def attend_tiles(
    q_at,
    k_desc,
    v_desc,
    out,
    sinks,
    tiles,
    items,
    block_table,
    table_stride,
    q_stride_token,
    q_stride_head,
    scale,
    softcap,
    window,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD: gl.constexpr,
    HEAD_V: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr,
    SINKS: gl.constexpr,
):
    """Tiles of 128 pairs, one after the other: two groups of four warps compute, a warp sends for K and one for V."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
    )
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_at.dtype.element_ty
    q_memory = gl.allocate_shared_memory(dtype, [2 * QUERIES, 64, HEAD], Q_SHARED)
    k_memory = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD], k_desc.layout)
    v_memory = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_V], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    fence_async_shared()
    barriers = (k_full, k_empty, v_full, v_empty, turn)
    gl.warp_specialize(
        [
            (_consume, (
                tiles, items, q_at, out, sinks, q_memory, k_memory, v_memory, barriers, q_stride_token, q_stride_head,
                scale, softcap, window, 0, KV_HEADS, GROUP, HEAD, HEAD_V, PAGE, BLOCK_N, STAGES, QUERIES,
                SOFTCAP, WINDOW, SINKS,
            )),
            (_consume, (
                tiles, items, q_at, out, sinks, q_memory, k_memory, v_memory, barriers, q_stride_token, q_stride_head,
                scale, softcap, window, 1, KV_HEADS, GROUP, HEAD, HEAD_V, PAGE, BLOCK_N, STAGES, QUERIES,
                SOFTCAP, WINDOW, SINKS,
            )),
            (_produce, (
                tiles, items, k_desc, k_memory, k_full, k_empty, block_table, table_stride, window,
                KV_HEADS, BLOCK_SIZE, PAGE, BLOCK_N, STAGES, WINDOW,
            )),
            (_produce, (
                tiles, items, v_desc, v_memory, v_full, v_empty, block_table, table_stride, window,
                KV_HEADS, BLOCK_SIZE, PAGE, BLOCK_N, STAGES, WINDOW,
            )),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip
