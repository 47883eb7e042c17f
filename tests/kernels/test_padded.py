"""The padded layout against the plain model, every position, teacher-forced."""

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import (
    BLOCK_SIZE,
    CPU,
    LENGTHS,
    NUM_BLOCKS,
    batched_logits,
    largest_difference,
    plain_logits,
    token_rows,
    wanting_all_logits,
)

from ropeway.kernels import padded
from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.step import RowInput, StepInput

# as for packed, and families whose code does not use the attention interface
NAMES = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "deepseek_v3",
    "bloom",
    "falcon",
    "falcon-alibi",
    "mpt",
)
CHUNKS = {"whole": (99,), "single": (1,), "mixed": (1, 1, 1, 2, 5, 9)}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_model(name: str, chunks: tuple[int, ...]) -> None:
    """Guards the referee: left pads, masks, ALiBi and positions as the model's own code makes them of our grid."""
    model = build(FAMILIES[name])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    forward = PaddedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan))
    logits = batched_logits(forward, tokens, chunks)
    assert largest_difference(logits, plain_logits(model, tokens)) < 1e-4


def test_the_comparison_sees_a_shifted_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: a gather that is one column off must not pass unseen."""
    model = build(FAMILIES["llama"])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    right = padded.context_slots
    monkeypatch.setattr(padded, "context_slots", lambda *args: right(*args).roll(1, dims=1))
    logits = batched_logits(PaddedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE)), tokens, (1, 5))
    assert largest_difference(logits, plain_logits(model, tokens)) > 0.1


def mixed_rows() -> list[RowInput]:
    return [
        RowInput(0, [5, 6, 7], 0, [1]),
        RowInput(1, [8], 0, [2]),
        RowInput(2, [3, 4], 0, [3], sample=False),
        RowInput(3, [2], 0, [4]),
        RowInput(4, [1, 9, 9, 9, 2], 0, [5, 6]),
    ]


def test_logits_keep_the_order_of_the_batch() -> None:
    """Guards the two forwards of a step: decode rows and chunks are mixed in the batch, and run apart."""
    model = build(FAMILIES["llama"])
    batch = LeftPaddedBatch.build(StepInput(mixed_rows()), BLOCK_SIZE, CPU)
    plain = plain_logits(model, [row.token_ids for row in mixed_rows()])
    logits = PaddedForward(model, KVPool(8, BLOCK_SIZE))(batch)
    assert logits.shape == (4, VOCAB_SIZE)
    assert largest_difference(list(logits), [plain[row][-1] for row in (0, 1, 3, 4)]) < 1e-5
    every = PaddedForward(model, KVPool(8, BLOCK_SIZE))(wanting_all_logits(batch))
    assert largest_difference([every], [torch.cat(plain)]) < 1e-5


def test_a_step_of_unfinished_chunks_has_no_logits() -> None:
    """Guards steps that sample nothing: an empty index must not mean all."""
    row = RowInput(0, [5, 6, 7], 0, [1], sample=False)
    batch = LeftPaddedBatch.build(StepInput([row]), BLOCK_SIZE, CPU)
    assert PaddedForward(build(FAMILIES["llama"]), KVPool(8, BLOCK_SIZE))(batch).shape == (0, VOCAB_SIZE)


def test_pads_are_counted() -> None:
    """Guards padding_ratio, and that a long chunk does not pad the decode rows: 2 x 1 and 3 x 5 places."""
    batch = LeftPaddedBatch.build(StepInput(mixed_rows()), BLOCK_SIZE, CPU)
    assert PaddedForward(build(FAMILIES["llama"]), KVPool(8, BLOCK_SIZE)).computed_slots(batch) == 2 + 15


def test_freed_blocks_are_not_read() -> None:
    """Guards sliding windows: the mask hides freed blocks, but 0 * NaN of block 0 would still be NaN."""
    model = build(FAMILIES["mistral"])
    tokens = token_rows([17], VOCAB_SIZE)
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    forward = PaddedForward(model, pool)
    table = [7, 3, 9, 5, 2]
    for start, stop, freed in ((0, 16, 0), (16, 17, 2)):  # window 8: position 16 sees 9..16, blocks 0 and 1 are gone
        row = RowInput(0, tokens[0][start:stop], start, [0] * freed + table[freed : -(-stop // BLOCK_SIZE)])
        logits = forward(LeftPaddedBatch.build(StepInput([row]), BLOCK_SIZE, CPU))
    assert largest_difference([logits[0]], [plain_logits(model, tokens)[0][16]]) < 1e-5


def test_layouts_share_model_and_pool() -> None:
    """Guards the switch of attention: what one layout wrote, the other reads, each with its own implementation."""
    model = build(FAMILIES["gemma2"])
    tokens = token_rows([9], VOCAB_SIZE)
    pool = KVPool(8, BLOCK_SIZE, fill=torch.nan)
    layouts = [PackedForward(model, pool), PaddedForward(model, pool)]
    logits = []
    for position, token in enumerate(tokens[0]):
        row = RowInput(0, [token], position, [4, 1, 6][: position // BLOCK_SIZE + 1])
        logits.append(layouts[position % 2](LeftPaddedBatch.build(StepInput([row]), BLOCK_SIZE, CPU)))
    assert largest_difference([torch.cat(logits)], plain_logits(model, tokens)) < 1e-5
