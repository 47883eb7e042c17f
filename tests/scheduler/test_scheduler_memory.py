"""Who gets blocks, who gives them back, and who is never admitted. That tokens survive it is shown in test_engine."""

import pytest
from desk import OWNER, Desk, shape

from ropeway.scheduler.limits import RequestTooLong


def test_the_last_row_in_rank_gives_way() -> None:
    """Guards who is preempted, and that it goes on later with everything it had."""
    desk = Desk(blocks=4, block_size=2)
    desk.add(1, prompt=2, priority=1)
    desk.add(2, prompt=2, priority=1)
    for token in (5, 6, 7):
        desk.step(token)  # now each has two full blocks, and both need a third
    plan = desk.plan()
    assert shape(plan) == [(1, 4, 1)]
    assert [row.request_id for row in desk.scheduler.waiting] == [2]
    assert desk.scheduler.stats.preemptions == desk.reason("preempted") == 1
    desk.read(plan)
    desk.scheduler.abort(OWNER, 1)
    plan = desk.plan()
    assert plan.step.joins[0].output_ids == [5, 6, 7]
    assert shape(plan) == [(2, 2, 3)]  # the first of its two blocks was still cached


def test_the_oldest_row_is_never_preempted() -> None:
    """Guards progress: some row always ends, even if all others have priority."""
    desk = Desk(blocks=4, block_size=2)
    desk.add(1, prompt=2, priority=5)
    desk.add(2, prompt=2, priority=0)
    for token in (5, 6, 7):
        desk.step(token)
    assert shape(desk.plan()) == [(1, 4, 1)]
    assert [row.request_id for row in desk.scheduler.waiting] == [2]


def test_a_row_takes_nothing_from_rows_before_it() -> None:
    """Guards rows against losing what they have: the last one waits for blocks, and goes on where it was."""
    desk = Desk(blocks=4, block_size=4)
    desk.add(1, prompt=4)
    desk.add(2, prompt=7)
    desk.step()
    desk.step()  # 1 takes the last block
    plan = desk.plan()
    assert shape(plan) == [(1, 5, 1)]
    assert (desk.reason("no free blocks"), desk.scheduler.stats.preemptions) == (1, 0)
    desk.read(plan)
    desk.scheduler.abort(OWNER, 1)
    plan = desk.plan()
    assert shape(plan) == [(2, 8, 1)]
    assert plan.step.joins == []


def test_a_row_with_a_token_in_flight_is_preempted_after_it_was_read() -> None:
    """Guards lag 1: the token is not lost, and no step in flight belongs to a row that waits."""
    desk = Desk(blocks=4, block_size=2)
    desk.add(1, prompt=2)
    desk.add(2, prompt=2)
    flights = [desk.plan(), desk.plan()]
    desk.read(flights[0], 5)
    flights.append(desk.plan())
    desk.read(flights[1], 6)
    assert desk.scheduler.plan(0.0) is None
    assert (desk.reason("no free blocks"), desk.scheduler.stats.preemptions) == (1, 0)
    assert [output.token_ids for output in desk.read(flights[2], 7)] == [[7], [7]]
    assert shape(desk.plan()) == [(1, 4, 1)]
    (row,) = desk.scheduler.waiting
    assert (row.tokens[2:], row.computed, row.block_table) == ([5, 6, 7], 0, [])


def test_a_victim_that_was_planned_already_leaves_the_step() -> None:
    """Guards a step in which a row computes into blocks that it has just given away."""
    desk = Desk(blocks=4, block_size=2)
    desk.add(1, prompt=2, priority=5)
    desk.add(2, prompt=1, priority=0)
    for token in (5, 6, 7):
        desk.step(token)
    assert desk.pool.num_available == 0
    assert shape(desk.plan()) == [(1, 4, 1)]  # 2 came first and had room, but 1 is the oldest
    assert [row.request_id for row in desk.scheduler.waiting] == [2]


def test_a_preempted_row_makes_its_prefix_findable_again() -> None:
    """Guards the prefix cache: others used the memory of its blocks, and it computed them once more."""
    desk = Desk(blocks=6, block_size=2)
    desk.add(1, prompt=5, max_tokens=8)
    desk.add(2, prompt=3, max_tokens=4)
    while desk.scheduler.num_unfinished:
        desk.step()
    assert desk.scheduler.stats.preemptions == 1
    desk.add(3, prompt=[2000, 2001, 2002], max_tokens=1)
    assert desk.step()[0].cached_tokens == 2


@pytest.mark.parametrize(("blocks", "admitted"), [(5, False), (6, True)])
def test_a_row_is_admitted_only_if_it_can_stay(blocks: int, admitted: bool) -> None:
    """Guards long prompts against being admitted, preempted and computed again: 1 is left a block to grow into."""
    desk = Desk(blocks=blocks, block_size=2, tokens=4)
    desk.add(1, prompt=1)
    desk.step()
    desk.add(2, prompt=8, max_tokens=1)
    assert shape(desk.plan()) == [(1, 1, 1), (2, 0, 3)][: 1 + admitted]
    assert desk.reason("no free blocks") == (not admitted)


def test_a_chunk_owns_the_blocks_of_the_whole_prompt() -> None:
    """Guards a long prompt against rows that are admitted after it: half-way it would be preempted by the oldest."""
    desk = Desk(blocks=6, block_size=2, tokens=2)
    desk.add(1, prompt=8, max_tokens=1)
    desk.step()
    assert desk.pool.num_available == 2


@pytest.mark.parametrize(("prompt", "max_tokens"), [(100, 1), (101, 1), (30, 12)])
def test_a_request_that_never_fits_is_refused(prompt: int, max_tokens: int) -> None:
    """Guards the queue against a row that would wait for ever, or preempt everybody and still fail."""
    desk = Desk(blocks=10, block_size=4)
    with pytest.raises(RequestTooLong, match=str(prompt)):
        desk.add(1, prompt=prompt, max_tokens=max_tokens)
    assert desk.scheduler.num_unfinished == 0
    desk.add(1, prompt=30, max_tokens=11)  # its last token is sent, but never computed
