"""Staging: the tensors of a step, against the plain constructor; block tables that only get what is new; pads."""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged_steps import CPU

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import BIASED, DRAWN, PENALISED, SamplingState
from ropeway.kernels.staging import Columns, Size, Staged, Staging
from ropeway.kernels.step import UNREAD, RowInput, RowState, StepInput

ROWS, BLOCK_SIZE, MAX_BLOCKS = 5, 4, 12
LARGEST = Size(64, ROWS + 1)


def make_staging(largest: Size | None = LARGEST) -> Staging:
    return Staging(SamplingState(ROWS, 50, CPU), BLOCK_SIZE, MAX_BLOCKS, CPU, largest)


def steps(seed: int, count: int = 30) -> Iterator[StepInput]:
    """Rows that join in any slot, compute chunks, then unread tokens, and leave; a slot is soon somebody else's."""
    rng = random.Random(seed)
    free = list(range(1, 200))
    rows: dict[int, tuple[list[int], int, list[int]]] = {}  # slot -> tokens, computed, table
    last: list[int] = []
    for _ in range(count):
        joins = []
        for slot in range(ROWS):
            if slot not in rows and rng.random() < 0.4:
                tokens = [rng.randrange(50) for _ in range(rng.randint(1, 20))]
                rows[slot] = tokens, 0, []
                joins.append(RowState(slot, SamplingParams(), tokens, []))
        inputs = []
        for slot in rng.sample(list(rows), rng.randint(0, len(rows))) or list(rows)[:1]:
            tokens, done, table = rows[slot]
            ids = tokens[done : done + rng.randint(1, 9)]
            previous = -1
            if not ids:
                unread = slot in last
                ids, previous = ([UNREAD], last.index(slot)) if unread else ([rng.randrange(50)], -1)
            while len(table) * BLOCK_SIZE < done + len(ids):
                table.append(free.pop(rng.randrange(len(free))))
            inputs.append(RowInput(slot, ids, done, list(table), previous, sample=done + len(ids) >= len(tokens)))
            rows[slot] = tokens, done + len(ids), table
        if inputs:
            yield StepInput(inputs, joins, [(rng.randrange(9), 9) for _ in range(rng.randrange(3))])
            last = [row.state_slot for row in inputs]
        for slot in list(rows):
            if rows[slot][1] > 30 or (slot in last and rng.random() < 0.1):
                free += rows.pop(slot)[2]
                last = [-1 if other == slot else other for other in last]


def batch_of(staging: Staging, staged: Staged) -> LeftPaddedBatch:
    counts = staged.columns.counts
    return staging.batch(staged.tensors, tuple(counts.tolist()), tuple((staged.columns.starts + counts).tolist()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rounded=st.booleans())
def test_it_agrees_with_the_plain_constructor(seed: int, rounded: bool) -> None:
    """Guards every field, over many steps: blocks that came earlier, slots that changed hands, what lay in the static
    buffer before; and the ids that only the device knows."""
    staging = make_staging()
    for number, step in enumerate(steps(seed)):
        expected = LeftPaddedBatch.build(step, BLOCK_SIZE, CPU)
        columns = Columns.of(step.rows)
        n, rows = columns.size.tokens, columns.size.rows
        staging.last_ids.copy_(torch.arange(100, 100 + ROWS + 1))
        staging._static.fill_(0x7E)
        staged = staging.stage(step, columns, Size(n + 7, ROWS + 1) if rounded and number % 2 else None)
        got = batch_of(staging, staged)
        unread = expected.prev_row >= 0
        assert torch.equal(got.token_ids[:n][~unread], expected.token_ids[~unread])
        assert torch.equal(got.token_ids[:n][unread], 100 + expected.prev_row[unread].long())
        for name in ("prev_row", "positions", "slot"):
            assert torch.equal(getattr(got, name)[:n], getattr(expected, name)), name
        for name in ("context_len", "state_slot"):
            assert torch.equal(getattr(got, name)[:rows], getattr(expected, name)), name
        assert torch.equal(got.row_start[: rows + 1], expected.row_start)
        assert torch.equal(staged.copies, expected.copies)
        assert (got.query_lens, got.context_lens) == (expected.query_lens, expected.context_lens)
        for row, context in enumerate(expected.context_lens):
            blocks = -(-context // BLOCK_SIZE)
            assert torch.equal(got.block_table[row, :blocks], expected.block_table[row, :blocks])
        for name in ("token_ids", "prev_row", "positions", "row_start", "context_len", "block_table", "slot"):
            assert getattr(got, name).dtype == getattr(expected, name).dtype, name


def test_pads() -> None:
    """Guards block 0 and the spare slot: pads that wrote, read or counted anywhere else would change a row."""
    staging = make_staging()
    step = StepInput([RowInput(2, [7, 8, 9], 4, [3, 5]), RowInput(0, [6], 0, [4], sample=False)])
    staging._static.fill_(0x7E)
    staged = staging.stage(step, Columns.of(step.rows), Size(10, 5))
    tensors = staged.tensors
    assert tensors.row_start.tolist() == [0, 3, 4, 5, 6, 10]
    assert tensors.logits_index.tolist() == [2, 3, 4, 5, 9]
    assert tensors.context_len.tolist() == [7, 1, 0, 0, 0]
    assert tensors.state_slot.tolist() == [2, 0, ROWS, ROWS, ROWS]
    assert tensors.sample_slot.tolist() == [2, ROWS, ROWS, ROWS, ROWS]
    assert tensors.sample_position.tolist() == [7, 1, 0, 0, 0]
    assert tensors.slot.tolist() == [20, 21, 22, 16] + [0] * 6
    assert tensors.token_ids.tolist() == [7, 8, 9, 6] + [0] * 6
    assert tensors.prev_row.tolist() == [-1] * 10
    assert not staging.batch(tensors, (1,) * 5, (48,) * 5).block_table[2:].any()
    assert (staged.sample_slots.tolist(), staged.sample_positions.tolist()) == ([2, ROWS], [7, 1])
    full = staging.stage(StepInput(step.rows), Columns.of(step.rows), Size(4, 4))  # rows of pads without a token
    assert full.tensors.row_start.tolist() == [0, 3, 4, 4, 4]
    with pytest.raises(AssertionError, match="rows of their own"):
        staging.stage(StepInput(step.rows), Columns.of(step.rows), Size(5, 2))


def test_flags_are_the_kernels_bits() -> None:
    """Guards rows without penalties from the history of others: what only the host needs must not reach the kernels."""
    staging = make_staging()
    staging._state.work[:3] = DRAWN, BIASED | DRAWN, PENALISED
    step = StepInput([RowInput(row, [1], 0, [1 + row]) for row in range(3)])
    assert staging.stage(step, Columns.of(step.rows)).tensors.sample_flags.tolist() == [0, 1, 2]


def test_a_step_of_its_own_buffer_stays() -> None:
    """Guards flights that are still computing: the next step must not write over their inputs."""
    staging = make_staging(None)
    first = StepInput([RowInput(0, [7, 8], 0, [3])])
    staged = staging.stage(first, Columns.of(first.rows))
    second = StepInput([RowInput(1, [9, 9], 0, [4])])
    staging.stage(second, Columns.of(second.rows))
    assert staged.tensors.token_ids.tolist() == [7, 8]
    assert staged.tensors.slot.tolist() == [12, 13]


@pytest.mark.parametrize(
    "row",
    [
        RowInput(0, [1, 2, 3, 4, 5], 0, [1]),
        RowInput(0, [1], 4, [1, 0]),
        RowInput(0, [UNREAD], 0, [1]),
        RowInput(0, [1], 0, [1], prev_row=0),
        RowInput(0, [], 0, [1]),
        RowInput(0, [1], 0, [1] * (MAX_BLOCKS + 1)),
    ],
    ids=["table too short", "block freed", "unread from nowhere", "known and from the last step", "no tokens", "long"],
)
def test_a_wrong_plan_is_caught(row: RowInput) -> None:
    """Guards the shared pool: a token without a block of its own would overwrite somebody else's."""
    with pytest.raises(AssertionError):
        make_staging().stage(StepInput([row], [RowState(0, SamplingParams(), [1], [])]), Columns.of([row]))


def test_fields_are_aligned() -> None:
    """Guards start-up and first requests: Triton compiles a kernel again for pointers that are no multiple of 16."""
    staging = make_staging()
    for rows in range(1, ROWS + 1):
        tensors = staging.static_tensors(Size(rows + 2, rows))
        for name in tensors.__slots__:
            offset = getattr(tensors, name).data_ptr() - staging._static.data_ptr()
            assert offset % 16 == 0, name
