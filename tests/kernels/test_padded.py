"""The padded layout against the plain model, every position, teacher-forced."""

from collections.abc import Sequence

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


def rows_of(lengths: Sequence[int], starts: Sequence[int]) -> LeftPaddedBatch:
    """A batch of rows with so many tokens after so many cached ones; all share block 1, since nobody runs it."""
    rows = [
        RowInput(index, [1] * length, start, [1] * -(-(start + length) // BLOCK_SIZE))
        for index, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]
    return LeftPaddedBatch.build(StepInput(rows), BLOCK_SIZE, CPU)


@pytest.mark.parametrize("lengths", [[1600] + [10] * 40, [16, 17, 32, 33, 64, 500, 513, 1024, 1, 1], [2, 3, 4]])
def test_a_long_chunk_pads_no_short_ones(lengths: list[int]) -> None:
    """Guards ragged prefills: a chunk of 1,600 tokens beside forty of 10 once computed 65,600 places, not 2,000."""
    forward = PaddedForward(build(FAMILIES["llama"]), KVPool(8, BLOCK_SIZE))
    places = forward.computed_slots(rows_of(lengths, [0] * len(lengths)))
    assert sum(lengths) <= places <= sum(length if length == 1 else max(2 * length, 16) for length in lengths)


def test_a_long_context_pads_no_short_ones() -> None:
    """Guards decode rows: one row with 4,000 tokens of context must not make thirty short ones gather as many."""
    parts = padded._parts(rows_of([1] * 31, [5] * 15 + [4000] + [100] * 15))
    assert sorted(parts) == [[row for row in range(31) if row != 15], [15]]


def test_the_parts_of_a_ragged_step_are_put_together() -> None:
    """Guards the order of logits when decode rows and chunks of several sizes go in many forwards."""
    model = build(FAMILIES["llama"])
    tokens = token_rows((40, 3, 17, 1, 65, 20, 1, 36), VOCAB_SIZE)
    blocks = iter(range(1, NUM_BLOCKS))
    rows = [RowInput(i, ids, 0, [next(blocks) for _ in ids[::BLOCK_SIZE]]) for i, ids in enumerate(tokens)]
    batch = LeftPaddedBatch.build(StepInput(rows), BLOCK_SIZE, CPU)
    assert len(padded._parts(batch)) > 3
    logits = PaddedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE))(wanting_all_logits(batch))
    assert largest_difference([logits], [torch.cat(plain_logits(model, tokens))]) < 1e-4


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
