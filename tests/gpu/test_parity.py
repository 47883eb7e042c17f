"""Families packed on a GPU, through the Triton kernels, against the plain model on the CPU; fp32. By hand."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import (
    BLOCK_SIZE,
    LENGTHS,
    NUM_BLOCKS,
    largest_difference,
    plain_logits,
    ragged_steps,
    token_rows,
    wanting_all_logits,
)
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
CUDA = torch.device("cuda")
PACKED = [name for name, family in FAMILIES.items() if family.packed]


class DeafPool(KVPool):
    """Attention returns zeros, since all values are zero."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, slots, torch.zeros_like(k), torch.zeros_like(v))


def batched_on_gpu(model: PreTrainedModel, tokens: list[list[int]], pool: KVPool, shift: int = 0) -> list[torch.Tensor]:
    """[T,V] per sequence on the CPU, all of them run together in chunks; positions of later chunks off by `shift`."""
    forward = PackedForward(model, pool)
    logits = [torch.full((len(row), VOCAB_SIZE), torch.nan) for row in tokens]
    for ragged in ragged_steps(tokens, (1, 1, 1, 2, 5, 9)):
        batch = wanting_all_logits(LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CUDA))
        later = (batch.context_len > batch.row_start.diff()).repeat_interleave(batch.row_start.diff())
        positions = batch.positions + shift * later
        out = forward(replace(batch, logits_index=batch.logits_index.cuda(), positions=positions)).cpu()
        lengths = [stop - start for _, start, stop in ragged.spans]
        for (index, start, stop), part in zip(ragged.spans, out.split(lengths), strict=True):
            logits[index][start:stop] = part
    return logits


@pytest.mark.parametrize("name", PACKED)
def test_equals_the_plain_model(name: str) -> None:
    """Guards the whole way on a GPU, and itself: broken attention or positions must show."""
    model = build(FAMILIES[name])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    expected = plain_logits(model, tokens)
    model.cuda()
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    assert largest_difference(batched_on_gpu(model, tokens, pool), expected) < 1e-3
    assert largest_difference(batched_on_gpu(model, tokens, DeafPool(NUM_BLOCKS, BLOCK_SIZE)), expected) > 0.01
    assert largest_difference(batched_on_gpu(model, tokens, KVPool(NUM_BLOCKS, BLOCK_SIZE), shift=1), expected) > 0.01
