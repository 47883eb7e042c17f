"""Runs steps: `launch` puts one on the device, `Flight.read` waits for what it gave. Knows no request.

A flight may be read after the next launch: a row's token that is still unread then goes from one launch to the next
on the device. `launch` waits for no result; on CUDA its copies of the batch to the device, from pageable memory, still
wait for what the stream was given before them.
"""

from dataclasses import dataclass, replace

import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.sampler import Sampled, Sampler
from ropeway.kernels.step import StepInput, StepOutput, TokenLogprobs


@dataclass(slots=True, frozen=True)
class Flight:
    """A step on its way."""

    rows: int
    sampled_rows: list[int]
    """Rows of the step that sample, in the order of `sampled`."""
    top_counts: list[int | None]
    """Per sampled row: most likely tokens to report, 0 = only the chosen one, None = no logprobs."""
    sampled: Sampled | None
    computed_slots: int

    def read(self) -> StepOutput:
        """Wait for the step and bring its results to the host."""
        output = StepOutput([-1] * self.rows, [True] * self.rows, computed_slots=self.computed_slots)
        if self.sampled is None:
            return output
        ids, finite = self.sampled.token_ids.tolist(), self.sampled.finite.tolist()
        for row, token_id, is_finite in zip(self.sampled_rows, ids, finite, strict=True):
            output.token_ids[row] = token_id
            output.finite[row] = is_finite
        output.logprobs = self._logprobs(self.sampled)
        return output

    def _logprobs(self, sampled: Sampled) -> dict[int, TokenLogprobs]:
        if sampled.logprobs is None:
            return {}
        chosen = sampled.logprobs.tolist()
        ids = [] if sampled.top_ids is None else sampled.top_ids.tolist()
        values = [] if sampled.top_logprobs is None else sampled.top_logprobs.tolist()
        return {
            row: TokenLogprobs(chosen[line], list(zip(ids[line], values[line], strict=True))[:count] if count else [])
            for line, (row, count) in enumerate(zip(self.sampled_rows, self.top_counts, strict=True))
            if count is not None
        }


class ModelRunner:
    """One model, one KV pool, one sampling state; steps run in launch order."""

    def __init__(self, forward: Forward, pool: KVPool, sampler: Sampler, block_size: int, device: torch.device) -> None:
        self._forward = forward
        self._pool = pool
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._last_ids = torch.empty(0, dtype=torch.int64, device=device)
        """[rows of the last step]: the ids it sampled, -1 for rows that did not sample."""

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Flight:
        """Joins, block copies, forward, sampling. `UNREAD` ids are those that the previous launch sampled."""
        self._sampler.state.join(step.joins)
        batch = LeftPaddedBatch.build(step, self._block_size, self._device)
        self._pool.copy_blocks(batch.copies)
        logits = self._forward(self._with_unread(batch))
        sampled_rows = [index for index, row in enumerate(step.rows) if row.sample]
        sampled = self._sample(step, sampled_rows, logits) if sampled_rows else None
        self._last_ids = torch.full((batch.B,), -1, dtype=torch.int64, device=self._device)
        if sampled is not None:
            self._last_ids[torch.tensor(sampled_rows, device=self._device)] = sampled.token_ids
        top_counts = [self._top_count(step.rows[row].state_slot) for row in sampled_rows]
        return Flight(batch.B, sampled_rows, top_counts, sampled, self._forward.computed_slots(batch))

    def _with_unread(self, batch: LeftPaddedBatch) -> LeftPaddedBatch:
        """Fill in the ids that only the device knows."""
        if self._last_ids.shape[0] == 0:
            return batch
        known = batch.token_ids
        last = self._last_ids[batch.prev_row.clamp(min=0).long()]
        return replace(batch, token_ids=torch.where(batch.prev_row < 0, known, last))

    def _sample(self, step: StepInput, rows: list[int], logits: torch.Tensor) -> Sampled:
        slots = torch.tensor([step.rows[row].state_slot for row in rows])
        positions = torch.tensor([step.rows[row].start + len(step.rows[row].token_ids) for row in rows])
        return self._sampler.sample(logits, slots, positions)

    def _top_count(self, state_slot: int) -> int | None:
        needs = self._sampler.state.needs[state_slot]
        assert needs is not None, f"no row joined at slot {state_slot}"
        return needs.logprobs
