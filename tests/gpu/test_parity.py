"""Families packed on a GPU, through the Triton kernels, against the plain model on the CPU; fp32. `make test-gpu`."""

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
from sabotage import DeafPool, Shifted, Swapped
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
CUDA = torch.device("cuda")
PACKED = [
    pytest.param(name, marks=() if family.common else pytest.mark.slow)
    for name, family in FAMILIES.items()
    if family.packed
]
LIMIT, BROKEN = 1e-3, 0.01
"""Of logits in fp32; what is broken is off by more than ten times as much."""


@pytest.fixture(autouse=True)
def true_fp32() -> None:
    """Products of fp32 are not rounded to tf32: that alone is off by more than LIMIT."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    assert torch.get_float32_matmul_precision() == "highest"


def batched_on_gpu(forward: Forward, tokens: list[list[int]]) -> list[torch.Tensor]:
    """[T,V] per sequence on the CPU, all of them run together in chunks."""
    logits = [torch.full((len(row), VOCAB_SIZE), torch.nan) for row in tokens]
    for ragged in ragged_steps(tokens, (1, 1, 1, 2, 5, 9)):
        batch = wanting_all_logits(LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CUDA))
        out = forward(replace(batch, logits_index=batch.logits_index.cuda())).cpu()
        lengths = [stop - start for _, start, stop in ragged.spans]
        for (index, start, stop), part in zip(ragged.spans, out.split(lengths), strict=True):
            logits[index][start:stop] = part
    return logits


def sabotaged(model: PreTrainedModel, sabotage: str) -> Forward:
    """The model packed on the GPU, broken in one way; "" = not at all."""
    kind = DeafPool if sabotage == "zeros" else KVPool
    forward: Forward = PackedForward(model, kind(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan))
    if sabotage == "shifted":
        return Shifted(forward, position_ids=True)
    return Swapped(forward) if sabotage == "swapped" else forward


@pytest.mark.parametrize("name", PACKED)
def test_equals_the_plain_model(name: str) -> None:
    """Guards the whole way on a GPU, and itself: broken attention, positions or block tables must show."""
    model = build(FAMILIES[name])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    expected = plain_logits(model, tokens)
    model.cuda()
    assert largest_difference(batched_on_gpu(sabotaged(model, ""), tokens), expected) < LIMIT
    for sabotage in ("zeros", "shifted", "swapped"):
        assert largest_difference(batched_on_gpu(sabotaged(model, sabotage), tokens), expected) > BROKEN, sabotage


def test_enough_families() -> None:
    """Guards this file: a changed mark must not empty it."""
    assert sum(family.packed and family.common for family in FAMILIES.values()) >= 12
