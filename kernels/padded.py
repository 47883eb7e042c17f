"""The padded layout: the grid materialised as left-padded `[B,T]` tensors, as `generate()` does, over the shared pool.

The universal base and the referee: the model's own mask and position code runs untouched, on a `Cache` whose layers
write the real tokens to the pool and hand back each row's context, right-aligned. Decode rows of about the same context
and chunks of about the same length go in separate forwards of one step, so that no long row pads thirty short ones.
"""

from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ropeway.kernels.attention import context_slots, grouped_rows
from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import ModelCall, plain_attention, use_attention
from ropeway.kernels.fp8_cache import restored
from ropeway.kernels.kv_pool import KVPool

SHORT_CHUNK = 16
"""Chunks with at most this many tokens share a forward: their pads cost less than another one."""


class PaddedForward:
    """Runs a step of a model padded. Holds no state of a batch."""

    def __init__(self, model: PreTrainedModel, pool: KVPool) -> None:
        self._model = model
        self._call = ModelCall(model)
        self._pool = pool
        self._attention = plain_attention(model)
        self._num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers

    @torch.inference_mode()
    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        """As `Forward` says; all token ids known."""
        use_attention(self._model, self._attention)
        parts = _parts(batch)
        if len(parts) == 1:
            return self._run(batch)
        logits = torch.cat([self._run(batch.select(rows)) for rows in parts])
        row = np.searchsorted(np.cumsum(batch.query_lens), batch.logits_tokens, side="right")
        line = np.concatenate([np.flatnonzero(np.isin(row, rows)) for rows in parts])
        return logits[torch.from_numpy(np.argsort(line)).to(logits.device)]

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        """Token places that the forwards of this batch compute, pads included."""
        return sum(len(rows) * max(batch.query_lens[row] for row in rows) for rows in _parts(batch))

    def _run(self, batch: LeftPaddedBatch) -> torch.Tensor:
        """One forward of the whole batch as a grid."""
        grid = _Grid(batch)
        wanted = batch.grid_places()[list(batch.logits_tokens)]
        first = int((wanted % batch.T).min(initial=batch.T))  # the model's head runs on columns [first, T) alone
        logits = self._call(
            keep=torch.arange(first, batch.T, device=batch.slot.device),
            input_ids=batch.to_grid(pad_id=0),
            attention_mask=batch.attention_mask(),
            position_ids=batch.spread(batch.positions, pad=0),
            past_key_values=Cache(layers=[_PoolLayer(self._pool, layer, grid) for layer in range(self._num_layers)]),
            use_cache=True,
        )
        row, column = (torch.from_numpy(index).to(logits.device) for index in np.divmod(wanted, batch.T))
        return logits[row, column - first]


class _Grid:
    """What every layer of one forward needs to write and to gather."""

    def __init__(self, batch: LeftPaddedBatch) -> None:
        self.write_slots = batch.slot
        self.places = torch.from_numpy(batch.grid_places()).to(batch.slot.device)
        """[N] int64: the real tokens among the grid's B*T places; pads are never written."""
        self.read_slots = context_slots(batch.block_table, batch.context_len, batch.block_size, batch.S)
        """[B,S] int64."""
        self.past = batch.S - batch.T
        self.total = batch.S


class _PoolLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """A layer of transformers' cache whose storage is the pool."""

    is_sliding = False

    def __init__(self, pool: KVPool, layer: int, grid: _Grid) -> None:
        super().__init__()
        self._pool = pool
        self._layer = layer
        self._grid = grid

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pool makes itself."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new [B,Hkv,T,D], return every row's context, left-padded: [B,Hkv,S,D] and [B,Hkv,S,Dv]."""
        k, v = (new.transpose(1, 2).flatten(0, 1)[self._grid.places] for new in (key_states, value_states))
        self._pool.write(self._layer, self._grid.write_slots, k, v)
        slots, scales = self._grid.read_slots, self._pool.scales(self._layer)
        k, v = (
            pool.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[2:]).transpose(1, 2)
            for pool in self._pool.layer(self._layer)
        )
        return restored(k, scales.k, key_states.dtype), restored(v, scales.v, value_states.dtype)

    def get_seq_length(self) -> int:
        """Columns before the new ones."""
        return self._grid.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of keys, offset of the first)."""
        return self._grid.total, 0

    def get_max_length(self) -> int:
        """-1: no limit of its own."""
        return -1


def _parts(batch: LeftPaddedBatch) -> list[list[int]]:
    """Rows of each forward. Its places are fewer than twice the tokens, or `SHORT_CHUNK` per row.

    Rows that want more logits than their last token's are apart: the head runs on whole columns."""
    groups = grouped_rows(batch, SHORT_CHUNK)
    if len(batch.logits_tokens) <= batch.B:
        return groups
    row = np.searchsorted(np.cumsum(batch.query_lens), batch.logits_tokens, side="right")
    wide = set(np.flatnonzero(np.bincount(row, minlength=batch.B) > 1).tolist())
    halves = [[one for one in group if (one in wide) == apart] for group in groups for apart in (False, True)]
    return [half for half in halves if half]
