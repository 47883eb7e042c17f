"""The device code of `triton_attention.py`, which says what a tile, a split and a short row are."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from ropeway.kernels.triton_attention_plan import first_key
from ropeway.kernels.triton_jit import gdc_launch_dependents, gdc_wait, jit, tl


@jit()
def _locate(row_start, rows, tile, SHORT_QUERY: tl.constexpr, BLOCK_Q: tl.constexpr):
    """A long row's tile: its row, first token, tokens from there on, and tokens of the tile: 0 if there is no such.

    Tiles of row b are numbered from row_start[b] // BLOCK_Q + b, which leaves every row at least as many numbers as it
    has tiles, and needs no list of them.
    """
    before = 0
    for start in range(0, rows, 256):
        index = start + tl.arange(0, 256)
        inside = index < rows
        begins = tl.load(row_start + index, mask=inside, other=0) // BLOCK_Q + index
        before += tl.sum((inside & (begins <= tile)).to(tl.int32))
    row = before - 1
    begin = tl.load(row_start + row)
    query_len = tl.load(row_start + row + 1) - begin
    offset = (tile - begin // BLOCK_Q - row) * BLOCK_Q
    tokens = tl.where(query_len > SHORT_QUERY, tl.minimum(query_len - offset, BLOCK_Q), 0)
    return row, begin + offset, query_len - offset, tokens


@jit()
def _finish(acc, total, peak, sink, SINKS: tl.constexpr):
    """Sums of exp2(score - peak) * value and of exp2(score - peak) to the softmax's result; without any key: 0."""
    if SINKS:
        highest = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - highest)
        total = total * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
    return acc / tl.where(total == 0, 1.0, total)[:, None]


@jit()
def _walk(
    acc,
    total,
    peak,
    q,
    k_base,
    v_base,
    table,
    begin,
    end,
    lowest,
    highest,
    position,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over key tiles in [begin, end); unless MASKED, every token of the tile sees all of them.

    Only keys in [lowest, highest] are read at all: 0 * NaN of somebody else's left-over is NaN. They all have a block,
    since only those that no token sees are freed.
    """
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        if MASKED:
            seen = (key >= lowest) & (key <= highest)
            block = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0)
        else:
            seen = key >= 0
            block = tl.load(table + key // BLOCK_SIZE)
        slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS
        k_at = k_base + slot[None, :] * HEAD + dim[:, None]
        v_at = v_base + slot[:, None] * HEAD_V + dim_v[None, :]
        if MASKED or BLOCK_D != HEAD:
            k = tl.load(k_at, mask=seen[None, :] & (dim < HEAD)[:, None], other=0.0)
        else:
            k = tl.load(k_at)
        score = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if SOFTCAP:
            # softcap * tanh(x), since tanh(x) = 1 - 2 / (exp(2x) + 1); `scale` holds 2 / softcap, both in base 2.
            score = softcap - 2 * softcap / (tl.exp2(score * scale) + 1)
        if MASKED:
            visible = seen[None, :] & (key[None, :] <= position[:, None])
            if WINDOW:
                visible = visible & (position[:, None] - key[None, :] < window)
            score = tl.where(visible, score, float("-inf"))
        highest_score = tl.max(score, 1)
        if not SOFTCAP:
            highest_score = highest_score * scale
        new_peak = tl.maximum(peak, highest_score)
        origin = new_peak
        if MASKED:
            origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        if SOFTCAP:  # noqa: SIM108
            weight = tl.exp2(score - origin[:, None])
        else:
            weight = tl.exp2(score * scale - origin[:, None])  # one fused multiply-add
        shrink = tl.exp2(peak - origin)
        total = total * shrink + tl.sum(weight, 1)
        if MASKED or BLOCK_DV != HEAD_V:
            v = tl.load(v_at, mask=seen[:, None] & (dim_v < HEAD_V)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@jit(run_time=("rows", "splits", "window", "table_stride"))
def attend(
    q_at,
    k_pool,
    v_pool,
    out,
    partial,
    stats,
    sinks,
    row_start,
    context_len,
    rows,
    block_table,
    table_stride,
    part_row,
    part_split,
    first_part,
    split_keys,
    arrived,
    q_stride_token,
    q_stride_head,
    splits,
    scale,
    v_scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHORT: tl.constexpr,
    SHORT_QUERY: tl.constexpr,
    LIVE: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HALF: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile, one KV head, one part of the keys; if WHOLE, key tiles that all tokens see are read without a mask;
    if HALF, products are in fp16."""
    LOG2E: tl.constexpr = 1.4426950408889634
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS
    if SHORT:
        row = tl.load(part_row + part)
        if row < 0:
            return
        split = tl.load(part_split + part)
        length = tl.load(split_keys)
        first = tl.load(row_start + row)
        tokens = tl.load(row_start + row + 1) - first
        left = tokens
    else:
        split = part % splits
        # The last tiles have the most keys: they start first.
        tile = tl.num_programs(0) // KV_HEADS // splits - 1 - part // splits
        row, first, left, tokens = _locate(row_start, rows, tile, SHORT_QUERY, BLOCK_Q)
    context = tl.load(context_len + row)
    if tokens <= 0:
        return
    pair = tl.arange(0, BLOCK_M)
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    real = token < tokens

    # positions of the row    0 ... lowest ............ first_position ... highest ... context - 1
    #                               keys seen by any    the tile's tokens
    first_position = context - left
    highest = first_position + tokens - 1
    lowest, begin = first_key(first_position, window, WINDOW, BLOCK_N)
    end = tl.maximum(highest + 1, begin)
    if not SHORT and SPLIT:
        length = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    if SHORT or SPLIT:
        begin += split * length
        end = tl.minimum(end, begin + length)
    whole = begin
    if WHOLE:
        whole = tl.minimum(tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, begin), end)

    dim = tl.arange(0, BLOCK_D)
    k_base = k_pool + kv_head * HEAD
    v_base = v_pool + kv_head * HEAD_V
    table = block_table + row.to(tl.int64) * table_stride
    q_offset = (first + token).to(tl.int64) * q_stride_token + head * q_stride_head
    q = tl.load(q_at + q_offset[:, None] + dim[None, :], mask=real[:, None] & (dim < HEAD)[None, :], other=0.0)
    if HALF:
        q = q.to(tl.float16)
    position = first_position + token
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    factor = scale * LOG2E
    if SOFTCAP:
        factor = 2 * scale * LOG2E / softcap
    if WHOLE:
        acc, total, peak = _walk(
            acc, total, peak, q, k_base, v_base, table, begin, whole, lowest, highest, position, factor,
            softcap * LOG2E, window, KV_HEADS, HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_SIZE, BLOCK_N, SOFTCAP, WINDOW,
            MASKED=False,
        )  # fmt: skip
    acc, total, peak = _walk(
        acc, total, peak, q, k_base, v_base, table, whole, end, lowest, highest, position, factor,
        softcap * LOG2E, window, KV_HEADS, HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_SIZE, BLOCK_N, SOFTCAP, WINDOW,
        MASKED=True,
    )  # fmt: skip
    acc *= v_scale

    dim_v = tl.arange(0, BLOCK_DV)
    parts = 1
    if SHORT:
        first_of_row = tl.load(first_part + row)
        parts = tl.load(first_part + row + 1) - first_of_row
        index = part.to(tl.int64) * KV_HEADS + kv_head
    elif SPLIT:
        parts = splits
        index = ((tile * KV_HEADS + kv_head) * splits + split).to(tl.int64)
    if (SHORT or SPLIT) and parts > 1:
        tl.store(stats + index * 2 * BLOCK_M + pair, peak)
        tl.store(stats + (index * 2 + 1) * BLOCK_M + pair, total)
        if begin < end:
            at = partial + (index * BLOCK_M + pair)[:, None] * HEAD_V + dim_v[None, :]
            tl.store(at, acc, mask=real[:, None] & (dim_v < HEAD_V)[None, :])
        if SHORT:
            # The program that comes last merges what all have stored.
            tl.debug_barrier()
            before = tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1, sem="acq_rel")
            if before == parts - 1:
                tl.store(arrived + row * KV_HEADS + kv_head, 0)
                _merge_parts(
                    out, partial, stats, sinks, first_of_row, parts, first, tokens, kv_head,
                    KV_HEADS, GROUP, HEAD_V, BLOCK_DV, BLOCK_M, LIVE, SINKS,
                )  # fmt: skip
    else:
        sink = peak
        if SINKS:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        result = _finish(acc, total, peak, sink, SINKS)
        at = ((first + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_V
        mask = real[:, None] & (dim_v < HEAD_V)[None, :]
        tl.store(out + at[:, None] + dim_v[None, :], result.to(out.dtype.element_ty), mask=mask)


@jit()
def _merge_parts(
    out,
    partial,
    stats,
    sinks,
    first_of_row,
    parts,
    first,
    tokens,
    kv_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LIVE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """A short row's partial results, summed in the order of its parts; past the first LIVE pairs there are none."""
    LOG2E: tl.constexpr = 1.4426950408889634
    STATS: tl.constexpr = 2048 // LIVE if LIVE > 32 else 64
    AT_ONCE: tl.constexpr = 8192 // (LIVE * BLOCK_DV) if LIVE * BLOCK_DV <= 1024 else (2 if LIVE <= 16 else 1)
    pair = tl.arange(0, LIVE)
    dim_v = tl.arange(0, BLOCK_DV)
    head = kv_head * GROUP + pair % GROUP
    real = pair // GROUP < tokens
    first_index = first_of_row.to(tl.int64) * KV_HEADS + kv_head
    total = tl.zeros([LIVE], tl.float32)
    peak = tl.full([LIVE], float("-inf"), tl.float32)
    for start in range(0, parts, STATS):
        part = start + tl.arange(0, STATS)
        at = (first_index + part * KV_HEADS)[:, None] * 2 * BLOCK_M + pair[None, :]
        there = (part < parts)[:, None] & real[None, :]
        peaks = tl.load(stats + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + at + BLOCK_M, mask=there, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - origin) + tl.sum(totals * tl.exp2(peaks - origin[None, :]), 0)
        peak = new_peak
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    acc = tl.zeros([LIVE, BLOCK_DV], tl.float32)
    for start in tl.range(0, parts, AT_ONCE, num_stages=1):
        part = start + tl.arange(0, AT_ONCE)[:, None, None]
        index = first_index + part * KV_HEADS
        there = (part < parts) & real[None, :, None]
        at = stats + index * 2 * BLOCK_M + pair[None, :, None]
        peaks = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        at = (index * BLOCK_M + pair[None, :, None]) * HEAD_V + dim_v[None, None, :]
        sums = tl.load(partial + at, mask=there & (dim_v < HEAD_V)[None, None, :], other=0.0, cache_modifier=".cg")
        acc += tl.sum(sums * tl.exp2(peaks - origin[None, :, None]), 0)
    sink = peak
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
    result = _finish(acc, total, peak, sink, SINKS)
    at = ((first + pair // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_V
    mask = real[:, None] & (dim_v < HEAD_V)[None, :]
    tl.store(out + at[:, None] + dim_v[None, :], result.to(out.dtype.element_ty), mask=mask)


@jit(run_time=("rows",))
def merge(
    out,
    partial,
    stats,
    sinks,
    row_start,
    context_len,
    rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHORT_QUERY: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits' partial results of one pair of a long row, summed; what an empty split left is not read."""
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1)
    _, first, _, tokens = _locate(row_start, rows, tl.program_id(0) // KV_HEADS, SHORT_QUERY, BLOCK_M // GROUP)
    if pair // GROUP >= tokens:
        return
    index = program * SPLITS + tl.arange(0, SPLITS)
    dim_v = tl.arange(0, BLOCK_DV)
    peaks = tl.load(stats + index * 2 * BLOCK_M + pair)
    totals = tl.load(stats + (index * 2 + 1) * BLOCK_M + pair)
    peak = tl.max(peaks, 0)
    used = totals != 0
    shrink = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    mask = used[:, None] & (dim_v < HEAD_V)[None, :]
    parts = tl.load(partial + (index * BLOCK_M + pair)[:, None] * HEAD_V + dim_v[None, :], mask=mask, other=0.0)
    acc = tl.sum(parts * shrink[:, None], 0)[None, :]
    total = tl.sum(totals * shrink, 0)
    head = (tl.program_id(0) % KV_HEADS) * GROUP + pair % GROUP
    one = tl.zeros([1], tl.float32)
    sink = one
    if SINKS:
        sink = one + tl.load(sinks + head).to(tl.float32) * LOG2E
    result = _finish(acc, one + total, one + peak, sink, SINKS)
    at = ((first + pair // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_V
    tl.store(out + at + dim_v[None, :], result.to(out.dtype.element_ty), mask=(dim_v < HEAD_V)[None, :])
