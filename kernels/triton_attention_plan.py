"""Which program attends to which keys of a short row: a list made on the device, once per step, for all layers alike.

Rows of one step may have contexts from one token to the model's longest, and a captured graph knows none of them. So
the keys of all short rows are cut into about as many parts as programs should run, each as long as the others and at
least one per row: a long context gets many, and the bound on contexts decides nothing but the size of the list.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch

from ropeway.kernels.triton_jit import ceil_div, jit, tl


@dataclass(slots=True, frozen=True)
class Plan:
    """P parts of the keys of B rows. All int32, on the device."""

    part_row: torch.Tensor
    """[P], -1 where there is no such part."""
    part_split: torch.Tensor
    """[P], how many parts of the same row stand before it."""
    first_part: torch.Tensor
    """[B+1], a row's first part; the next row's behind its last."""
    split_keys: torch.Tensor
    """[1], keys per part: whole key tiles, counted from the first tile that the row sees."""
    arrived: torch.Tensor
    """[B * kv_heads], zeros before and after each layer: parts that are done."""


def make_plan(
    row_start: torch.Tensor,
    context_len: torch.Tensor,
    *,
    parts: int,
    kv_heads: int,
    short_query: int,
    block_n: int,
    window: int | None,
) -> Plan:
    """A plan with about `parts` parts, and at least one per row of 1 .. short_query tokens.

    row_start [B+1], context_len [B], both int32; block_n: keys per tile; window: as in `paged_attention`."""
    rows = context_len.shape[0]
    new = context_len.new_empty
    most = rows + max(parts, ceil_div(rows, 2))  # each row may end in a part that is shorter
    plan = Plan(new(most), new(most), new(rows + 1), new(1), new(rows * kv_heads))
    _plan[(1,)](
        *(row_start, context_len, plan.part_row, plan.part_split, plan.first_part, plan.split_keys, plan.arrived),
        *(rows, most, parts, window or 0, kv_heads),
        SHORT_QUERY=short_query,
        BLOCK_N=block_n,
        WINDOW=window is not None,
    )
    return plan


@jit()
def first_key(first_position, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The lowest key that any token from this position on sees, and where its key tile begins."""
    lowest = first_position * 0
    if WINDOW:
        lowest = tl.maximum(first_position - window + 1, 0)
    return lowest, lowest // BLOCK_N * BLOCK_N


@jit(run_time=("rows", "parts", "wanted", "window", "heads"))
def _plan(
    row_start,
    context_len,
    part_row,
    part_split,
    first_part,
    split_keys,
    arrived,
    rows,
    parts,
    wanted,
    window,
    heads,
    SHORT_QUERY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Cuts the short rows' keys into parts of one length, at least one per row, and lists them."""
    total = tl.zeros([1], tl.int64)
    for start in range(0, rows, 256):
        keys, _ = _keys_of(row_start, context_len, rows, start, window, SHORT_QUERY, BLOCK_N, WINDOW)
        total += tl.sum(keys, 0)
    # The same number for rows of the same length; among many rows only those are cut that are twice as long as others.
    pieces = tl.where(rows * 2 <= wanted, wanted // rows * rows, tl.cdiv(rows, 2))
    length = tl.cdiv(tl.cdiv(total, pieces), BLOCK_N) * BLOCK_N
    length = tl.maximum(length, BLOCK_N).to(tl.int32)
    tl.store(split_keys + tl.arange(0, 1), length)
    used = 0
    for start in range(0, rows, 256):
        row = start + tl.arange(0, 256)
        keys, short = _keys_of(row_start, context_len, rows, start, window, SHORT_QUERY, BLOCK_N, WINDOW)
        count = tl.where(short, tl.maximum(tl.cdiv(keys, length), 1), 0)
        first = used + tl.cumsum(count, 0) - count
        tl.store(first_part + row, first, mask=row < rows)
        for split in range(0, tl.max(count, 0)):
            tl.store(part_row + first + split, row, mask=split < count)
            tl.store(part_split + first + split, split + row * 0, mask=split < count)
        used += tl.sum(count, 0)
    tl.store(first_part + rows, used)
    for start in range(used, parts, 256):
        part = start + tl.arange(0, 256)
        tl.store(part_row + part, -1 + part * 0, mask=part < parts)
    for start in range(0, rows * heads, 256):
        index = start + tl.arange(0, 256)
        tl.store(arrived + index, index * 0, mask=index < rows * heads)


@jit()
def _keys_of(
    row_start,
    context_len,
    rows,
    start,
    window,
    SHORT_QUERY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Of 256 rows: how many keys a short one walks over, from the first's tile on; and which are short."""
    row = start + tl.arange(0, 256)
    inside = row < rows
    begin = tl.load(row_start + row, mask=inside, other=0)
    query_len = tl.load(row_start + row + 1, mask=inside, other=0) - begin
    context = tl.load(context_len + row, mask=inside, other=0)
    _, first = first_key(context - query_len, window, WINDOW, BLOCK_N)
    short = inside & (query_len > 0) & (query_len <= SHORT_QUERY)
    return tl.where(short, tl.maximum(context - first, 0), 0), short
