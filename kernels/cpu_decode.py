"""What decode rows read of the KV pool, on the CPU: whole blocks, for a few rows of like contexts at a time.

A gather copies, so the copy is made where the next kernel finds it in the cache: into one buffer that all calls of a
step share, for no more rows than fit there. Whole blocks are copied twice as fast as single tokens. Knows blocks and
rows, no queries and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

GATHERED_TOKENS = 2048
"""Tokens gathered at once: 2 MB each of K and V with 4 KV heads of 64 in fp32. Measured there: 1024 to 2048 are equal,
8192 take twice as long."""


class Scratch:
    """Memory for the gathered K and V of one call; a step's calls follow each other."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, pool: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The blocks `ids` [n] of a pool [num_blocks,block_size,Hkv,D] -> [n*block_size,Hkv,D], until the next call."""
        size = pool[0].numel() * len(ids)
        flat = self._flat.get((name, pool.dtype))
        if flat is None or len(flat) < size:
            flat = self._flat[name, pool.dtype] = pool.new_empty(size)
        torch.index_select(pool.flatten(1), 0, ids, out=flat[:size].view(len(ids), -1))
        return flat[:size].view(-1, *pool.shape[2:])


@dataclass(slots=True, frozen=True)
class _Blocks:
    """What the rows read in a layer; column 0 is the first token of a row's first block here."""

    ids: torch.Tensor
    """[G*count] int64 blocks of the pool."""
    dead: torch.Tensor
    """Columns of the G*S that hold nothing of the row: what lies there is somebody's left-over, perhaps NaN."""
    mask: torch.Tensor | None
    """[G,1,1,S] bool, True = visible; None = all of them."""


@dataclass(slots=True)
class DecodeRows:
    """G rows of one token each that share a call."""

    tokens: torch.Tensor
    """[G] int64: where their tokens stand among the batch's."""
    context_len: torch.Tensor
    """[G] int64."""
    block_table: torch.Tensor
    """[G,P] int64; 0 where a block was freed."""
    block_size: int
    longest: int
    """The largest `context_len`, at least 1."""
    blocks: dict[int | None, _Blocks] = field(default_factory=dict)
    """By sliding window: made once per step, shared by the layers."""

    def gather(
        self, k_pool: torch.Tensor, v_pool: torch.Tensor, window: int | None, scratch: Scratch, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """K [G,Hkv,S,D], V [G,Hkv,S,Dv] in `dtype` and which of them are visible, [G,1,1,S] or None for all.

        Valid until the next gather into the same scratch. Columns that are not visible hold finite values.
        """
        if window is not None and window >= self.longest:
            window = None
        if window not in self.blocks:
            self.blocks[window] = self._find(window)
        blocks = self.blocks[window]
        rows = len(self.tokens)
        k, v = (
            scratch.take(name, pool, blocks.ids)
            .to(dtype)
            .index_fill_(0, blocks.dead, 0)
            .view(rows, -1, *pool.shape[2:])
            for name, pool in (("k", k_pool), ("v", v_pool))
        )
        return k.transpose(1, 2), v.transpose(1, 2), blocks.mask

    def _find(self, window: int | None) -> _Blocks:
        """The last `count` blocks of each row, or all it has.

        position   first * size ....................... context_len - 1
        column     0 ...... (freed or out of the window) ...... newest ... S - 1 = count * size - 1
        """
        size, device = self.block_size, self.block_table.device
        count = -(-self.longest // size)
        if window is not None:
            count = min(count, (window + size - 2) // size + 1)  # so many can a window that begins anywhere touch
        first = ((self.context_len - 1) // size - count + 1).clamp(min=0)
        places = first[:, None] + torch.arange(count, device=device)
        ids = self.block_table.gather(1, places.clamp(max=self.block_table.shape[1] - 1))
        position = first[:, None] * size + torch.arange(count * size, device=device)
        context_len = self.context_len[:, None]
        dead = (position >= context_len) | (ids == 0).repeat_interleave(size, dim=1)
        visible = position < context_len.clamp(min=1)  # a row without context sees one column: none would be NaN
        if window is not None:
            visible &= context_len - 1 - position < window
        mask = None if bool(visible.all()) else visible[:, None, None]
        return _Blocks(ids.flatten(), dead.flatten().nonzero().squeeze(1), mask)


def calls_of(contexts: Sequence[int]) -> list[list[int]]:
    """Which rows share a call, given the context of each: rows of like contexts, so that none is padded to twice its
    length, as many as `GATHERED_TOKENS` allows."""
    calls: list[list[int]] = []
    for row in sorted(range(len(contexts)), key=lambda row: contexts[row]):
        call = calls[-1] if calls else []
        longest = max(contexts[row], 1)
        if not call or longest * (len(call) + 1) > GATHERED_TOKENS or longest > 2 * max(contexts[call[0]], SHORT):
            calls.append(call := [])
        call.append(row)
    return calls


SHORT = 64
"""Rows of up to twice so many tokens share calls, however short they are: a call costs about as much as such a pad."""
