"""Attention of ragged query rows over the KV pool: plain torch, the CPU path and the reference of every kernel.

On a GPU `triton_attention.py` does the work, but for float64.
Knows slots, rows and masks; no model. All decode rows of about the same context go in one grouped call, each longer
chunk goes alone, so that no row pays for another's length. KV heads are never expanded.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from ropeway.kernels import triton_attention
from ropeway.kernels.batch import LeftPaddedBatch

MAX_SCORES = 1 << 24
"""Scores held at once on the explicit path; longer chunks are cut along their queries."""

SHORT_CONTEXT = 256
"""Decode rows with at most this many tokens share one call, then one call per power of two."""


@dataclass(slots=True, frozen=True)
class _Gather:
    """Which slots a group reads, and what each query sees of them; the last column is each row's newest token."""

    slots: torch.Tensor
    """[G*S] int64."""
    mask: torch.Tensor | None
    """[G,1,Q,S] bool, True = visible; None = plain causal, no pads."""


@dataclass(slots=True)
class _Group:
    """G rows of one query length Q that share a call."""

    batch: LeftPaddedBatch
    rows: list[int]
    tokens: slice | torch.Tensor
    """Where the rows' G*Q tokens stand among the batch's N."""
    gathers: dict[int | None, _Gather] = field(default_factory=dict)
    """By sliding window: made once per step, shared by the layers."""

    @property
    def query_len(self) -> int:
        return self.batch.query_lens[self.rows[0]]

    def gather(self, window: int | None) -> _Gather:
        """What the group reads in a layer with this sliding window (None = everything)."""
        contexts = [self.batch.context_lens[row] for row in self.rows]
        longest = max(*contexts, self.query_len)
        if window is not None and window >= longest:
            window = None
        if window not in self.gathers:
            width = longest if window is None else min(longest, window + self.query_len - 1)
            self.gathers[window] = self._make_gather(window, width, padded=min(contexts) < width)
        return self.gathers[window]

    def _make_gather(self, window: int | None, width: int, padded: bool) -> _Gather:
        device = self.batch.block_table.device
        rows = torch.tensor(self.rows, device=device)
        context_len = self.batch.context_len[rows]
        slots = context_slots(self.batch.block_table[rows], context_len, self.batch.block_size, width).flatten()
        if not padded and (self.query_len == 1 or (self.query_len == width and window is None)):
            return _Gather(slots, None)
        column = torch.arange(width, device=device)
        query = column[width - self.query_len :, None]  # query i of a row stands in column S-Q+i
        mask = (column <= query) & (column >= width - context_len[:, None, None])
        if window is not None:
            mask &= query - column < window
        return _Gather(slots, mask[:, None])


class AttentionMetadata:
    """What attention needs of one step's batch; made once per step, shared by all layers."""

    def __init__(self, batch: LeftPaddedBatch) -> None:
        self._batch = batch

    @cached_property
    def groups(self) -> list[_Group]:
        return [_Group(self._batch, rows, _tokens_of(self._batch, rows)) for rows in grouped_rows(self._batch)]

    @cached_property
    def ragged(self) -> triton_attention.RaggedRows:
        return triton_attention.RaggedRows.of(self._batch)


def context_slots(block_table: torch.Tensor, context_len: torch.Tensor, block_size: int, width: int) -> torch.Tensor:
    """Slots of each row's last `width` tokens, right-aligned: block_table [G,P], context_len [G] -> [G,width] int64.

    column    0 ........ width - context_len ............ width - 1
                 pads          position 0 ...... position context_len - 1

    Pads, and blocks that are freed because no layer sees them, point at the row's own newest token: what they hold is
    multiplied by a probability of 0, and 0 * NaN of somebody else's left-over would be NaN.
    """
    position = context_len.long()[:, None] - width + torch.arange(width, device=block_table.device)
    block = block_table.gather(1, position.clamp(min=0) // block_size).long()
    slots = block * block_size + position.clamp(min=0) % block_size
    return torch.where((position >= 0) & (block > 0), slots, slots[:, -1:])


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every token over its own row's context, which the pools already hold.

    Args:
        q: [N,Hq,D].
        k_pool: [num_blocks,block_size,Hkv,D]; query head h reads KV head h // (Hq / Hkv).
        v_pool: [num_blocks,block_size,Hkv,Dv].
        metadata: of the batch with these N tokens.
        scale: factor of q.k.
        sliding_window: a key is visible iff query position - key position < sliding_window.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        sinks: [Hq], per head one logit more in the softmax, which has no value (gpt-oss, arXiv:2309.17453).

    Returns:
        [N,Hq,Dv] in q's dtype; the softmax is at least fp32. A row without context gets finite values of no meaning.
    """
    if q.is_cuda and q.dtype != torch.float64:
        return triton_attention.paged_attention(
            *(q, k_pool, v_pool, metadata.ragged),
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
    out = q.new_empty(*q.shape[:2], v_pool.shape[-1])
    for group in metadata.groups:
        gather = group.gather(sliding_window)
        rows = len(group.rows)
        queries = q[group.tokens].view(rows, group.query_len, *q.shape[1:]).transpose(1, 2)  # [G,Hq,Q,D]
        k, v = (  # [G,Hkv,S,D]
            pool.flatten(0, 1).index_select(0, gather.slots).view(rows, -1, *pool.shape[2:]).transpose(1, 2)
            for pool in (k_pool, v_pool)
        )
        if softcap is None and sinks is None:
            causal = gather.mask is None and group.query_len > 1
            attended = F.scaled_dot_product_attention(
                queries, k, v, gather.mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            attended = _explicit_attention(queries, k, v, gather.mask, scale, softcap, sinks)
        out[group.tokens] = attended.transpose(1, 2).flatten(0, 1)
    return out


def _explicit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` cannot do: softcap and sinks. Shapes as there: q [G,Hq,Q,D]."""
    groups, heads, queries, _ = q.shape
    kv_heads, width = k.shape[1:3]
    if mask is None:
        mask = q.new_ones(queries, width, dtype=torch.bool).tril(width - queries)[None, None]
    out = q.new_empty(groups, heads, queries, v.shape[-1])
    step = max(1, MAX_SCORES // (groups * heads * width))
    for start in range(0, queries, step):
        part = q[:, :, start : start + step]
        grid = (groups, kv_heads, heads // kv_heads, part.shape[2], width)
        scores = (part.reshape(groups, kv_heads, -1, q.shape[-1]) @ k.transpose(2, 3)).view(grid) * scale
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~mask[:, :, None, start : start + step], torch.finfo(scores.dtype).min)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*grid[:-1], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., :width].to(v.dtype)
        out[:, :, start : start + step] = (weights.flatten(2, 3) @ v).view(groups, heads, -1, v.shape[-1])
    return out


def grouped_rows(batch: LeftPaddedBatch, short_chunk: int | None = None) -> list[list[int]]:
    """Decode rows of about the same context together, each longer chunk alone.

    With `short_chunk`, chunks of about the same length go together too: those of at most so many tokens, then one
    group per power of two.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for row, (query, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if query == 1:
            key = ("decode", (max(context, SHORT_CONTEXT) - 1).bit_length())
        else:
            key = ("chunk", row if short_chunk is None else (max(query, short_chunk) - 1).bit_length())
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _tokens_of(batch: LeftPaddedBatch, rows: list[int]) -> slice | torch.Tensor:
    """The rows' tokens among the batch's N; rows that follow each other need no copy."""
    starts = list(accumulate(batch.query_lens, initial=0))
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(starts[rows[0]], starts[rows[-1] + 1])
    tokens = [token for row in rows for token in range(starts[row], starts[row + 1])]
    return torch.tensor(tokens, device=batch.token_ids.device)
