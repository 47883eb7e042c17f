"""A runner around a tiny model, and single steps through it."""

import torch
from families import VOCAB_SIZE
from ragged_steps import BLOCK_SIZE, CPU, NUM_BLOCKS
from transformers import PreTrainedModel

from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowInput, RowState, StepInput, StepOutput


def make_runner(
    model: PreTrainedModel, layout: type[PackedForward] | type[PaddedForward] = PackedForward
) -> ModelRunner:
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    return ModelRunner(layout(model, pool), pool, Sampler(SamplingState(8, VOCAB_SIZE, CPU)), BLOCK_SIZE, CPU)


def table(row: int) -> list[int]:
    """Sixteen blocks of the row's own, not in order."""
    return [1 + row + 4 * (15 - block) for block in range(16)]


def run_one(runner: ModelRunner, rows: list[RowInput], params: list[SamplingParams]) -> StepOutput:
    joins = [RowState(row.state_slot, p, row.token_ids, []) for row, p in zip(rows, params, strict=True)]
    return runner.launch(StepInput(rows, joins)).read()
