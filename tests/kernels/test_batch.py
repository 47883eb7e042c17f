"""LeftPaddedBatch: what a step becomes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged_steps import BLOCK_SIZE, CPU, ragged_steps, token_rows, wanting_all_logits

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.step import UNREAD, RowInput, StepInput


def example() -> LeftPaddedBatch:
    """A decode row whose token is unread, an unfinished chunk, a finished one."""
    rows = [
        RowInput(state_slot=7, token_ids=[UNREAD], start=5, block_table=[3, 2], prev_row=1),
        RowInput(state_slot=0, token_ids=[10, 11, 12], start=2, block_table=[9, 4], sample=False),
        RowInput(state_slot=3, token_ids=[20, 21], start=0, block_table=[5]),
    ]
    return LeftPaddedBatch.build(StepInput(rows, copies=[(6, 5)]), block_size=4, device=CPU)


def test_fields() -> None:
    """Guards values and dtypes of every field, which both layouts and each kernel rely on."""
    batch = example()
    expected = {
        "token_ids": ([-1, 10, 11, 12, 20, 21], torch.int64),
        "prev_row": ([1, -1, -1, -1, -1, -1], torch.int32),
        "positions": ([5, 2, 3, 4, 0, 1], torch.int64),
        "row_start": ([0, 1, 4, 6], torch.int32),
        "context_len": ([6, 5, 2], torch.int32),
        "block_table": ([[3, 2], [9, 4], [5, 0]], torch.int32),
        "slot": ([2 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 4 * 4 + 0, 5 * 4, 5 * 4 + 1], torch.int64),
        "logits_index": ([0, 5], torch.int64),
        "state_slot": ([7, 0, 3], torch.int32),
        "copies": ([[6, 5]], torch.int32),
        "left_pad": ([2, 0, 1], torch.int32),
    }
    for name, (values, dtype) in expected.items():
        tensor = getattr(batch, name)
        assert tensor.tolist() == values, name
        assert tensor.dtype == dtype, name
    assert (batch.B, batch.T, batch.S) == (3, 3, 6)
    assert (batch.query_lens, batch.context_lens, batch.logits_tokens) == ((1, 3, 2), (6, 5, 2), (0, 5))


def test_grid_is_left_padded() -> None:
    """Guards right alignment: with pads on the right, column T-1 would not be the newest token."""
    batch = example()
    assert batch.to_grid(pad_id=99).tolist() == [[99, 99, -1], [10, 11, 12], [99, 20, 21]]
    assert batch.attention_mask().tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert batch.padding_ratio == pytest.approx(3 / 9)


def test_no_copies_and_no_logits_keep_their_shapes() -> None:
    """Guards steps without copies or sampled rows: an empty tensor of the wrong shape breaks the forward."""
    row = RowInput(0, [1, 2], 0, [1], sample=False)
    batch = LeftPaddedBatch.build(StepInput([row]), 4, CPU)
    assert batch.copies.shape == (0, 2)
    assert batch.logits_index.shape == (0,)
    assert batch.logits_index.dtype == torch.int64


@pytest.mark.parametrize(
    "row",
    [
        RowInput(0, [1, 2, 3, 4, 5], 0, [1]),
        RowInput(0, [1], 4, [1, 0]),
        RowInput(0, [UNREAD], 0, [1]),
        RowInput(0, [1], 0, [1], prev_row=0),
        RowInput(0, [], 0, [1]),
    ],
    ids=["table too short", "block freed", "unread from nowhere", "known and from the last step", "no tokens"],
)
def test_a_wrong_plan_is_caught(row: RowInput) -> None:
    """Guards the shared pool: a token without a block of its own would overwrite somebody else's."""
    with pytest.raises((AssertionError, IndexError)):
        LeftPaddedBatch.build(StepInput([row]), 4, CPU)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 9), every=st.booleans())
def test_select_is_the_batch_of_those_rows(lengths: list[int], seed: int, every: bool) -> None:
    """Guards sub-batches: a chunk's logits would go to a decode row."""
    for ragged in ragged_steps(token_rows(lengths, 50, seed), chunks=(1, 1, 3, 7), seed=seed):
        rows = ragged.step.rows
        keep = [index for index in range(len(rows)) if (index + seed) % 3] or [0]
        batch = LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CPU)
        alone = LeftPaddedBatch.build(StepInput([rows[index] for index in keep]), BLOCK_SIZE, CPU)
        if every:
            batch, alone = wanting_all_logits(batch), wanting_all_logits(alone)
        selected = batch.select(keep)
        for name in LeftPaddedBatch.__slots__:
            got, wanted = getattr(selected, name), getattr(alone, name)
            if name == "block_table":  # stays as wide as the batch's
                got, wanted = got[:, : wanted.shape[1]], wanted
            assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted, name


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_every_token_has_a_slot_of_its_own(lengths: list[int], seed: int) -> None:
    """Guards slot arithmetic: two tokens in one slot lose one of them."""
    seen: set[int] = set()
    for ragged in ragged_steps(token_rows(lengths, 50, seed), chunks=(1, 2, 5), seed=seed):
        batch = LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CPU)
        slots = batch.slot.tolist()
        assert len(set(slots)) == len(slots)
        assert not seen & set(slots)
        seen |= set(slots)
        positions = [p for _, start, stop in ragged.spans for p in range(start, stop)]
        assert batch.positions.tolist() == positions
    assert len(seen) == sum(lengths)
