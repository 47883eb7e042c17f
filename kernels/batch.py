"""The batch everything shares: a left-padded grid of rows, described by flat tensors so that its pads cost nothing.

Knows token ids, positions and KV blocks; no text, no request, no model. Rows are right-aligned: column T-1 of every
row is its newest token.

    column          0 . . . . . . T-1
    row 0           . . . . . . . t      decode row: one token
    row 1           . . t t t t t t      prefill chunk
    row 2           t t t t t t t t      longest query of the step, so T = 8
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from ropeway.kernels.step import UNREAD, StepInput


@dataclass(slots=True, frozen=True)
class LeftPaddedBatch:
    """One step's rows (B of them, N real tokens). Made by `build`, read by both layouts and by attention.

    The tensors live on the device; the tuples are host copies, so that a forward's shapes are known without waiting
    for the device.
    """

    token_ids: torch.Tensor
    """[N] int64, row after row; -1 where `prev_row` says so."""
    prev_row: torch.Tensor
    """[N] int32: -1, or the row of the previous step whose sampled id (still on the device) this token is."""
    positions: torch.Tensor
    """[N] int64: position of each token in its own sequence."""
    row_start: torch.Tensor
    """[B+1] int32: row b's tokens are [row_start[b], row_start[b+1])."""
    context_len: torch.Tensor
    """[B] int32: tokens of the row in the cache after this step; 0 for a row that is only padding."""
    block_table: torch.Tensor
    """[B,P] int32: the row's KV blocks, 0 where one was freed; past the row's end anything, which nobody reads."""
    slot: torch.Tensor
    """[N] int64: where each token's K and V are written, block * block_size + offset."""
    logits_index: torch.Tensor
    """[L] int64, ascending: the tokens whose logits are wanted."""
    state_slot: torch.Tensor
    """[B] int32: the row's place in the persistent sampling state."""
    copies: torch.Tensor
    """[C,2] int32: (source, destination) blocks to copy before the forward."""
    block_size: int
    query_lens: tuple[int, ...]
    """Host copy of the rows' token counts."""
    context_lens: tuple[int, ...]
    """Host copy of `context_len`."""
    logits_tokens: tuple[int, ...]
    """Host copy of `logits_index`."""

    @classmethod
    def build(cls, step: StepInput, block_size: int, device: torch.device) -> "LeftPaddedBatch":
        """Turn a step into tensors. Every row has at least one token and blocks for all of its context."""
        rows = step.rows
        query_len = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
        start = np.array([row.start for row in rows], dtype=np.int64)
        row_start = np.concatenate(([0], np.cumsum(query_len)))
        n = int(row_start[-1])
        assert rows and query_len.min() > 0, "a row without tokens has no place in a step"

        token_ids = np.fromiter(chain.from_iterable(row.token_ids for row in rows), np.int64, n)
        row_of_token = np.repeat(np.arange(len(rows)), query_len)
        positions = np.arange(n) - row_start[row_of_token] + start[row_of_token]
        prev_row = np.full(n, -1, dtype=np.int32)
        prev_row[row_start[1:] - 1] = [row.prev_row for row in rows]
        assert ((token_ids == UNREAD) == (prev_row >= 0)).all(), "exactly the unread tokens come from the last step"

        table = _pad_tables([row.block_table for row in rows])
        block = table[row_of_token, positions // block_size].astype(np.int64)
        assert (block > 0).all(), "every computed token needs an owned block to write to"

        logits_index = (row_start[1:] - 1)[[row.sample for row in rows]]
        return cls(
            token_ids=_tensor(token_ids, device),
            prev_row=_tensor(prev_row, device),
            positions=_tensor(positions, device),
            row_start=_tensor(row_start.astype(np.int32), device),
            context_len=_tensor((start + query_len).astype(np.int32), device),
            block_table=_tensor(table, device),
            slot=_tensor(block * block_size + positions % block_size, device),
            logits_index=_tensor(logits_index, device),
            state_slot=_tensor(np.array([row.state_slot for row in rows], dtype=np.int32), device),
            copies=_tensor(np.array(step.copies, dtype=np.int32).reshape(-1, 2), device),
            block_size=block_size,
            query_lens=tuple(query_len.tolist()),
            context_lens=tuple((start + query_len).tolist()),
            logits_tokens=tuple(logits_index.tolist()),
        )

    @property
    def B(self) -> int:
        """Rows."""
        return len(self.query_lens)

    @property
    def T(self) -> int:
        """Columns of the grid: the longest query of the step."""
        return max(self.query_lens)

    @property
    def S(self) -> int:
        """Columns of the attention mask: the longest context after this step."""
        return max(*self.context_lens, self.T)

    @property
    def left_pad(self) -> torch.Tensor:
        """[B] int32: pads before each row's first token, T - query_len."""
        return self.T - self.row_start.diff()

    @property
    def padding_ratio(self) -> float:
        """Share of the materialised grid's places that hold no real token."""
        real = sum(query for query, context in zip(self.query_lens, self.context_lens, strict=True) if context)
        return 1 - real / (self.B * self.T)

    def grid_places(self) -> np.ndarray:
        """[N] int64 on the host: place of every token in the flattened [B,T] grid.

        row b's tokens     [row_start[b], row_start[b+1])
        land in the grid   [(b+1)*T - query_len[b], (b+1)*T)
        """
        shift = np.arange(1, self.B + 1) * self.T - np.cumsum(self.query_lens)
        places: np.ndarray = np.arange(sum(self.query_lens)) + np.repeat(shift, self.query_lens)
        return places

    def to_grid(self, pad_id: int) -> torch.Tensor:
        """[B,T] int64: the materialised left-padded ids."""
        return self.spread(self.token_ids, pad_id)

    def spread(self, values: torch.Tensor, pad: int) -> torch.Tensor:
        """Lay one number per token [N] out as the left-padded grid [B,T]."""
        grid = values.new_full((self.B * self.T,), pad)
        grid[_tensor(self.grid_places(), grid.device)] = values
        return grid.view(self.B, self.T)

    def attention_mask(self) -> torch.Tensor:
        """[B,S] int64: 1 for the row's context, right-aligned; 0 for the pads on its left."""
        column = torch.arange(self.S, device=self.context_len.device)
        return (column >= self.S - self.context_len[:, None]).long()

    def select(self, rows: Sequence[int]) -> "LeftPaddedBatch":
        """The batch of these rows alone, in this order, without the copies (a step does those once)."""
        device = self.token_ids.device
        row_start = np.concatenate(([0], np.cumsum(self.query_lens)))
        tokens = np.concatenate([np.arange(row_start[row], row_start[row + 1]) for row in rows])
        logits_index = np.flatnonzero(np.isin(tokens, self.logits_tokens))
        query_lens = [self.query_lens[row] for row in rows]
        token_index, row_index = _tensor(tokens, device), _tensor(np.array(rows, dtype=np.int64), device)
        return LeftPaddedBatch(
            token_ids=self.token_ids[token_index],
            prev_row=self.prev_row[token_index],
            positions=self.positions[token_index],
            row_start=_tensor(np.cumsum([0, *query_lens], dtype=np.int32), device),
            context_len=self.context_len[row_index],
            block_table=self.block_table[row_index],
            slot=self.slot[token_index],
            logits_index=_tensor(logits_index, device),
            state_slot=self.state_slot[row_index],
            copies=self.copies[:0],
            block_size=self.block_size,
            query_lens=tuple(query_lens),
            context_lens=tuple(self.context_lens[row] for row in rows),
            logits_tokens=tuple(logits_index.tolist()),
        )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _pad_tables(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged block tables -> [B,P] int32, filled up with the reserved block 0."""
    lengths = np.array([len(table) for table in tables])
    padded = np.zeros((len(tables), lengths.max()), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(tables), np.int32)
    return padded
