"""What joins leave in the persistent state."""

import torch

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import BIASED, DRAWN, PENALISED, SamplingState
from ropeway.kernels.step import RowState

V = 10
CPU = torch.device("cpu")


def row(
    slot: int, params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None
) -> RowState:
    return RowState(slot, params, prompt or [], output or [])


def test_parameters_land_in_their_slots() -> None:
    """Guards against mixed-up columns or slots, and a seed that loses bits on its way through a float."""
    state = SamplingState(4, V, CPU)
    a = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=2.0,
        seed=-(2**63) + 1,
    )
    b = SamplingParams(seed=2**53 + 1)
    state.join([row(3, a), row(1, b)])
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        values = getattr(state, name).tolist()
        assert (values[3], values[1]) == (getattr(a, name), getattr(b, name)), name
    assert state.top_k.tolist()[3] == 3
    assert (state.seed.tolist()[3], state.seed.tolist()[1]) == (a.seed, b.seed)


def test_tables_exist_only_once_somebody_needs_them() -> None:
    """Guards memory: one value per slot and token is the largest thing here."""
    state = SamplingState(4, V, CPU)
    state.join([row(0, SamplingParams(top_k=2, top_p=0.5, logprobs=5, min_tokens=3, stop_token_ids=(1,)), [1], [2])])
    assert state.bias is None and state.history is None
    state.join([row(1, SamplingParams(logit_bias={1: 1.0}))])
    assert state.bias is not None and state.history is None
    state.join([row(2, SamplingParams(presence_penalty=1.0))])
    assert state.history is not None


def test_history_counts_output_and_marks_the_prompt() -> None:
    """Guards penalties after a preemption or a crash: counts are rebuilt, nothing of the last row stays."""
    state = SamplingState(2, V, CPU)
    params = SamplingParams(repetition_penalty=1.1)
    state.join([row(1, params, [9, 9, 9], [8] * 5)])
    state.join([row(1, params, [1, 1, 2], [2, 3, 3])])
    assert state.history is not None
    assert state.history[1].tolist() == [0, 1, 3, 4, 0, 0, 0, 0, 0, 0]
    state.count(torch.tensor([1, 1]), torch.tensor([3, 0]))
    assert state.history[1].tolist() == [2, 1, 3, 6, 0, 0, 0, 0, 0, 0]
    assert not state.history[0].any()


def test_bias_of_a_slot_is_replaced() -> None:
    """Guards against the bans of a row that has left, and against a bias of -100 that only makes a token unlikely."""
    state = SamplingState(1, 4, CPU)
    state.join([row(0, SamplingParams(allowed_token_ids=(1, 2), logit_bias={0: 50.0, 2: -1.5}))])
    assert state.bias is not None
    assert state.bias[0].tolist() == [-torch.inf, 0, -1.5, -torch.inf]
    state.join([row(0, SamplingParams(logit_bias={3: -100.0, 1: 100.0}))])
    assert state.bias[0].tolist() == [0, 100, 0, -torch.inf]


def test_needs_say_what_a_row_costs() -> None:
    """Guards the promise that a parameter at its default costs nothing, and that no asked-for work is skipped."""
    state = SamplingState(1, V, CPU)

    def needs(params: SamplingParams) -> object:
        state.join([row(0, params, [1, 2, 3])])
        return state.needs[0]

    plain = needs(SamplingParams())
    assert plain == needs(SamplingParams(top_k=V, stop_token_ids=(), min_tokens=5))
    assert plain == needs(SamplingParams(top_k=V + 1, seed=5, temperature=0.3))
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(temperature=1e-300),  # 0 in fp32
        SamplingParams(top_k=V - 1),
        SamplingParams(top_p=0.99),
        SamplingParams(min_p=1e-6),
        SamplingParams(repetition_penalty=0.9),
        SamplingParams(frequency_penalty=-1.0),
        SamplingParams(presence_penalty=-1.0),
        SamplingParams(logit_bias={0: 0.0}),
        SamplingParams(allowed_token_ids=(0,)),
        SamplingParams(logprobs=0),
    ):
        assert plain != needs(params), params
    state.join([row(0, SamplingParams(min_tokens=2, stop_token_ids=(4,)), [1, 2, 3])])
    assert state.needs[0] is not None and state.needs[0].ban_stop_until == 5


def test_the_host_knows_what_a_slot_needs_now() -> None:
    """Guards a plain row in the slot of one with penalties: it would be penalised for what the other said."""
    state = SamplingState(2, V, CPU)
    params = SamplingParams(presence_penalty=1.0, logit_bias={1: 1.0}, logprobs=0, min_tokens=4, stop_token_ids=(1,))
    state.join([row(1, params, [1, 2])])
    assert (state.work[1], state.ban_stop_until[1], state.wants_logprobs[1]) == (BIASED | PENALISED | DRAWN, 6, True)
    state.join([row(1, SamplingParams(temperature=0.0))])
    assert (state.work[1], state.ban_stop_until[1], state.wants_logprobs[1]) == (0, 0, False)


def test_the_spare_slot_is_greedy_and_plain() -> None:
    """Guards pads: drawing, filtering or penalising for them costs time, and counts tokens that nobody said."""
    state = SamplingState(2, V, CPU)
    state.join([row(slot, SamplingParams(top_k=3, presence_penalty=1.0), [1]) for slot in range(2)])
    assert state.spare == 2
    assert (state.temperature[2], state.top_k[2], state.top_p[2], state.work[2]) == (0, 0, 1, 0)
