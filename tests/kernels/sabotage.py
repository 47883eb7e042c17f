"""Ways to break a batch. Whatever compares a batch with the plain model must notice every one of them."""

from dataclasses import dataclass, replace

import torch
from ragged_steps import BLOCK_SIZE

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward
from ropeway.kernels.kv_pool import KVPool


class DeafPool(KVPool):
    """Attention returns zeros, since all values are zero (or, where the cache holds latents of both, come out so)."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, slots, torch.zeros_like(k), torch.zeros_like(v))


@dataclass
class Shifted:
    """Positions are off by one in every step of a row but its first."""

    forward: Forward
    position_ids: bool

    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        lengths = torch.tensor(batch.query_lens, device=batch.positions.device)
        later = batch.context_len > lengths
        if self.position_ids:
            return self.forward(replace(batch, positions=batch.positions + later.repeat_interleave(lengths)))
        # These models count columns: the context stands one column further left than it should.
        return self.forward(replace(batch, context_len=batch.context_len - later.int()))

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        return self.forward.computed_slots(batch)


@dataclass
class Swapped:
    """The first two rows that can have exchanged the last blocks that were full before the step, in every step."""

    forward: Forward

    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        before = [context - query for context, query in zip(batch.context_lens, batch.query_lens, strict=True)]
        last_full = [length // BLOCK_SIZE - 1 for length in before]
        rows = [row for row, block in enumerate(last_full) if block >= 0][:2]
        if len(rows) == 2:
            blocks = [last_full[row] for row in rows]
            table = batch.block_table.clone()
            table[rows, blocks] = batch.block_table[rows[::-1], blocks[::-1]]
            batch = replace(batch, block_table=table)
        return self.forward(batch)

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        return self.forward.computed_slots(batch)
