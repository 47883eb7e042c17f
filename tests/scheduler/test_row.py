"""One choice: what is derived from what is stored."""

import pytest

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.messages import AddRequest, ChoiceStart
from ropeway.scheduler.row import Row, rows_of


def make_rows(
    choices: list[ChoiceStart], max_tokens: int = 4, max_model_len: int = 100, **sampling: object
) -> list[Row]:
    request = AddRequest(1, 7, [1, 2, 3], SamplingParams(**sampling), max_tokens, choices, arrival=5.0, priority=2)
    return rows_of(request, owner=9, max_model_len=max_model_len)


def test_each_choice_has_its_own_seed_wrapping_in_int64() -> None:
    """Guards choices that sample the same text, and a seed that no int64 tensor can hold."""
    rows = make_rows([ChoiceStart(0), ChoiceStart(3)], seed=2**63 - 2)
    assert [row.sampling.seed for row in rows] == [2**63 - 2, -(2**63) + 1]
    rows = make_rows([ChoiceStart(1)], seed=-1)
    assert rows[0].sampling.seed == 0


def test_choices_share_the_prompt_but_not_their_tokens() -> None:
    """Guards against one choice's output appearing in another's context."""
    first, second = make_rows([ChoiceStart(0), ChoiceStart(1, [8])])
    assert first.prompt_ids is second.prompt_ids
    first.tokens.append(5)
    assert (first.tokens, second.tokens, second.prompt_ids) == ([1, 2, 3, 5], [1, 2, 3, 8], [1, 2, 3])


def test_a_resumed_choice_counts_what_was_streamed_before() -> None:
    """Guards max_tokens after an engine crash: the client must not get more than it asked for."""
    (row,) = make_rows([ChoiceStart(0, [8, 9])], max_tokens=3)
    assert (row.num_prompt, row.num_output, row.num_resumed, row.num_tokens) == (3, 2, 2, 5)
    assert row.finish_reason() is None
    row.tokens.append(4)
    assert row.finish_reason() == "length"


def test_pending_counts_the_unread_token() -> None:
    """Guards the lag: an unread token has to be computed like a known one."""
    (row,) = make_rows([ChoiceStart(0)])
    assert (row.num_pending, row.holds_prompt) == (3, False)
    row.computed = 2
    assert (row.num_pending, row.holds_prompt) == (1, True)
    row.computed, row.in_flight = 3, 1
    assert (row.num_tokens, row.num_pending) == (4, 1)


@pytest.mark.parametrize(
    ("output", "reason"),
    [([], None), ([5], None), ([6], None), ([6, 5], None), ([6, 6], None), ([5, 5, 6], "stop"), ([5, 5, 5, 6], "stop")],
)
def test_a_stop_token_ends_the_row_after_min_tokens(output: list[int], reason: str | None) -> None:
    """Guards min_tokens against being off by one; "stop" comes before "length" when both are true."""
    (row,) = make_rows([ChoiceStart(0, output)], stop_token_ids=(6,), min_tokens=2)
    assert row.finish_reason() == reason


def test_the_context_ends_a_row_like_max_tokens() -> None:
    """Guards positions past the model's context."""
    (row,) = make_rows([ChoiceStart(0, [5, 5])], max_tokens=50, max_model_len=5)
    assert row.max_length == 5
    assert row.finish_reason() == "length"


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    """Guards chat prompts, which often end with EOS of the turn before."""
    (row,) = make_rows([ChoiceStart(0)], stop_token_ids=(3,))
    assert row.finish_reason() is None


def test_rank_is_priority_then_arrival() -> None:
    """Guards the order of admission and preemption; ties are broken, so it is the same in every run."""
    (row,) = make_rows([ChoiceStart(4)])
    assert row.rank == (2, 5.0, 7, 4)
    assert row.age == (5.0, 7, 4)
