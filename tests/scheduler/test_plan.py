"""From a draft to a launch: who joins, and what stands for tokens that nobody has read yet."""

from desk import OWNER, Desk, shape

from ropeway.kernels.step import UNREAD
from ropeway.scheduler.messages import ChoiceStart

# ---- joining ----


def test_a_joining_row_fills_its_state_slot() -> None:
    """Guards penalties and noise: the sampler knows only what the join tells it."""
    desk = Desk()
    desk.add(1, prompt=[1, 2], seed=40, choices=[ChoiceStart(2, [8, 9])])
    (join,) = desk.plan().step.joins
    assert (join.prompt_ids, join.output_ids, join.params.seed) == ([1, 2], [8, 9], 42)


def test_a_row_joins_once() -> None:
    """Guards the sampling state against being reset in every step."""
    desk = Desk(tokens=2)
    desk.add(1, prompt=3)
    plan = desk.plan()
    slot = plan.step.joins[0].state_slot
    desk.read(plan)
    for _ in range(3):
        plan = desk.plan()
        assert plan.step.joins == []
        assert plan.step.rows[0].state_slot == slot
        desk.read(plan)


# ---- the lag ----


def test_an_unread_token_is_a_placeholder() -> None:
    """Guards lag 1: the next step takes the id from the previous step's row, on the device."""
    desk = Desk()
    desk.add(1)
    desk.add(2)
    first = desk.plan()
    second = desk.plan()
    assert [part.token_ids for part in second.step.rows] == [[UNREAD], [UNREAD]]
    assert [part.prev_row for part in second.step.rows] == [0, 1]
    assert [part.start for part in second.step.rows] == [3, 3]
    assert [output.token_ids for output in desk.read(first, 5)] == [[5], [5]]
    third = desk.plan()
    assert [part.start for part in third.step.rows] == [4, 4]
    assert [output.token_ids for output in desk.read(second, 6)] == [[6], [6]]


def test_prev_row_is_the_place_in_the_previous_step() -> None:
    """Guards rows that move: a row before it leaves, so its place changes."""
    desk = Desk()
    desk.add(1)
    desk.add(2)
    first = desk.plan()
    desk.scheduler.abort(OWNER, 1)
    second = desk.plan()
    assert [part.prev_row for part in second.step.rows] == [1]
    desk.read(first)
    assert [part.prev_row for part in desk.plan().step.rows] == [0]


def test_a_row_is_not_planned_when_its_unread_token_is_its_last() -> None:
    """Guards work and blocks beyond max_tokens, and positions beyond the context."""
    for options, max_tokens in (({}, 1), ({"context": 4}, 50)):
        desk = Desk(**options)
        desk.add(1, prompt=3, max_tokens=max_tokens)
        first = desk.plan()
        assert desk.scheduler.plan(0.0) is None
        assert desk.reason("token unread") == 1
        assert desk.read(first)[0].finish_reason == "length"


def test_rows_of_the_host_wait_for_their_token() -> None:
    """Guards grammars and host processors: `max_in_flight` 0 waits, neighbours do not."""
    desk = Desk()
    desk.add(1)
    desk.add(2)
    first = desk.plan()
    desk.scheduler.running[0].max_in_flight = 0
    second = desk.plan()
    assert [row[0] for row in shape(second)] == [2]
    desk.read(first)
    assert shape(desk.plan()) == [(1, 3, 1), (2, 4, 1)]


def test_a_token_after_the_end_counts_for_nothing() -> None:
    """Guards usage and the stream: with lag 1 one token too many is computed after EOS."""
    desk = Desk()
    desk.add(1, stop_token_ids=(7,))
    first, second = desk.plan(), desk.plan()
    (output,) = desk.read(first, 7)
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ([7], "stop", 7)
    assert desk.read(second, 8) == []
    assert desk.scheduler.stats.generation_tokens == 1
    assert desk.scheduler.num_unfinished == 0


def test_what_was_computed_after_the_end_is_never_found() -> None:
    """Guards the prefix cache: the block that EOS fills is computed by a step that nobody reads for the row."""
    desk = Desk(block_size=4)
    desk.add(1, prompt=[1, 2, 3], stop_token_ids=(7,))
    first, second = desk.plan(), desk.plan()
    desk.read(first, 7)
    desk.read(second, 8)
    desk.add(2, prompt=[1, 2, 3, 7, 9])
    assert shape(desk.plan()) == [(2, 0, 5)]
