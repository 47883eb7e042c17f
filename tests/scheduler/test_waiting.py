"""The order of the queue."""

import random

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.messages import AddRequest, ChoiceStart
from ropeway.scheduler.row import Row, rows_of
from ropeway.scheduler.waiting import Waiting


def make_row(request_id: int, arrival: float = 0.0, priority: int = 0) -> Row:
    request = AddRequest(1, request_id, [1], SamplingParams(), 1, [ChoiceStart(0)], arrival=arrival, priority=priority)
    return rows_of(request, owner=0, max_model_len=10)[0]


def test_priority_comes_first_then_arrival() -> None:
    """Guards smaller-is-sooner, and first come first served within a priority."""
    late, urgent, early, patient = make_row(1, 9.0), make_row(2, 9.5, -1), make_row(3, 1.0), make_row(4, 0.0, 5)
    waiting = Waiting()
    for row in (late, urgent, early, patient):
        waiting.add(row)
    assert list(waiting) == [urgent, early, late, patient]
    assert len(waiting) == 4


def test_a_row_that_comes_back_is_first_among_equals() -> None:
    """Guards preempted rows against starving behind everything that arrived since."""
    waiting = Waiting()
    rows = [make_row(i, float(i)) for i in range(5)]
    for row in rows:
        waiting.add(row)
    waiting.remove(rows[1])
    waiting.add(rows[1])
    assert list(waiting) == rows


def test_rows_of_the_same_moment_are_told_apart() -> None:
    """Guards removal by rank: the clock's resolution must not decide which row leaves."""
    waiting = Waiting()
    rows = [make_row(i) for i in range(50)]
    for row in random.Random(0).sample(rows, 50):
        waiting.add(row)
    waiting.remove(rows[20])
    assert list(waiting) == rows[:20] + rows[21:]
