"""ModelRunner: steps in flight, tokens handed on unread, joins and copies."""

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import token_rows
from small_runner import make_runner, run_one, table
from transformers import PreTrainedModel

from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.runner import Flight, ModelRunner
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import UNREAD, RowInput, RowState, StepInput

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.2)
PROMPTS = token_rows((5, 1, 11), VOCAB_SIZE, seed=4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(FAMILIES["llama"])


def generate(runner: ModelRunner, params: SamplingParams, count: int, lag: int) -> list[list[int]]:
    """`count` tokens of every prompt, each flight read `lag` launches late; row r joins at step r."""
    out: list[list[int]] = [[] for _ in PROMPTS]
    waiting: list[tuple[Flight, list[int]]] = []
    launched = [0] * len(PROMPTS)
    members: list[int] = []
    for now in range(count + len(PROMPTS) + lag):
        rows, joins, last = [], [], members
        members = [row for row in range(len(PROMPTS)) if now >= row and launched[row] < count]
        for row in members:
            start, ids, previous = 0, PROMPTS[row], -1
            if launched[row] == 0:
                joins.append(RowState(row, params, PROMPTS[row], []))
            else:
                start = len(PROMPTS[row]) + launched[row] - 1
                unread = len(out[row]) < launched[row]
                ids, previous = ([UNREAD], last.index(row)) if unread else (out[row][-1:], -1)
            launched[row] += 1
            rows.append(RowInput(row, list(ids), start, table(row), prev_row=previous))
        if rows:
            waiting.append((runner.launch(StepInput(rows, joins)), members))
        while waiting and (len(waiting) > lag or not rows):
            flight, flown = waiting.pop(0)
            for row, token_id in zip(flown, flight.read().token_ids, strict=True):
                out[row].append(token_id)
    return out


@pytest.mark.parametrize("layout", [PackedForward, PaddedForward])
@pytest.mark.parametrize("lag", [0, 1])
def test_tokens_are_those_of_generate(
    model: PreTrainedModel, layout: type[PackedForward] | type[PaddedForward], lag: int
) -> None:
    """Guards the whole step, and unread tokens: with the wrong one handed on, texts mix."""
    tokens = generate(make_runner(model, layout), GREEDY, 20, lag)
    model.set_attn_implementation("sdpa")
    for prompt, got in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert got == out[0, len(prompt) :].tolist()
        assert len(set(got)) > 5


def test_lag_changes_nothing(model: PreTrainedModel) -> None:
    """Guards sampled rows at lag 1: noise and penalties depend on seed, position and the row's own past alone."""
    assert generate(make_runner(model), SEEDED, 20, 0) == generate(make_runner(model), SEEDED, 20, 1)


def test_noise_follows_the_position(model: PreTrainedModel) -> None:
    """Guards seeds: the position given to the sampler is the sampled token's, however the prompt was cut."""
    whole, cut = make_runner(model), make_runner(model)
    params = SamplingParams(temperature=3.0, seed=11)
    wanted = run_one(whole, [RowInput(0, PROMPTS[2], 0, table(0))], [params]).token_ids
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        row = RowInput(0, PROMPTS[2][start:stop], start, table(0), sample=stop == 11)
        joins = [RowState(0, params, PROMPTS[2], [])] if start == 0 else []
        output = cut.launch(StepInput([row], joins)).read()
    assert output.token_ids == wanted


def test_rows_that_do_not_sample(model: PreTrainedModel) -> None:
    """Guards the mapping of sampled lines to rows when unfinished chunks stand between them."""
    rows = [
        RowInput(3, PROMPTS[2][:4], 0, table(0), sample=False),
        RowInput(1, PROMPTS[0], 0, table(1)),
        RowInput(2, PROMPTS[2][:6], 0, table(2), sample=False),
        RowInput(0, PROMPTS[1], 0, table(3)),
    ]
    output = run_one(make_runner(model), rows, [GREEDY] * 4)
    alone = [run_one(make_runner(model), [rows[row]], [GREEDY]).token_ids[0] for row in (1, 3)]
    assert output.token_ids == [-1, alone[0], -1, alone[1]]
    assert output.finite == [True] * 4
    assert output.computed_slots == 4 + 5 + 6 + 1
    nothing = run_one(make_runner(model), rows[:1], [GREEDY])
    assert (nothing.token_ids, nothing.logprobs) == ([-1], {})


def test_logprobs_go_to_the_rows_that_asked(model: PreTrainedModel) -> None:
    """Guards counts per row: one row's top-5 must not appear in a row that asked for one, or for none."""
    asked = [None, 2, 0, 5]
    rows = [RowInput(slot, PROMPTS[slot % 3], 0, table(slot)) for slot in range(4)]
    output = run_one(make_runner(model), rows, [SamplingParams(temperature=0.0, logprobs=count) for count in asked])
    assert {row: len(logprobs.top) for row, logprobs in output.logprobs.items()} == {1: 2, 2: 0, 3: 5}
    for row in (1, 3):
        assert output.logprobs[row].top[0] == (output.token_ids[row], output.logprobs[row].logprob)


@pytest.mark.parametrize("layout", [PackedForward, PaddedForward])
def test_a_row_with_nan_is_alone_with_it(layout: type[PackedForward] | type[PaddedForward]) -> None:
    """Guards neighbours of a poisoned row, and rows that get its blocks later: NaN * 0 must not reach them."""
    model = build(FAMILIES["llama"])
    bad = 77
    model.get_input_embeddings().weight.data[bad] = torch.nan
    clean = [[token for token in prompt if token != bad] for prompt in PROMPTS]
    runner = make_runner(model, layout)
    rows = [
        RowInput(0, clean[0], 0, table(0)),
        RowInput(1, [3, bad, 4, 5, 6], 0, table(1)),
        RowInput(2, clean[2], 0, table(2)),
    ]
    output = run_one(runner, rows, [GREEDY] * 3)
    alone = [run_one(make_runner(model, layout), [row], [GREEDY]).token_ids[0] for row in (rows[0], rows[2])]
    assert output.finite == [True, False, True]
    assert [output.token_ids[0], output.token_ids[2]] == alone
    assert 0 <= output.token_ids[1] < VOCAB_SIZE
    heir = [RowInput(3, clean[2], 0, table(3)), RowInput(1, clean[0][:2], 0, table(1))]  # row 1's poisoned blocks
    later = run_one(runner, heir, [GREEDY] * 2)
    assert later.finite == [True, True]
    assert later.token_ids[0] == alone[1]


def test_copies_come_before_the_forward(model: PreTrainedModel) -> None:
    """Guards forks: two choices of a prompt share blocks, the second writes to a copy of the last one."""
    prompt = PROMPTS[0]  # 5 tokens: one full block, one shared partial block
    runner = make_runner(model)
    first = run_one(runner, [RowInput(0, prompt, 0, [1, 2])], [GREEDY]).token_ids[0]
    forks = [RowInput(0, [first], 5, [1, 2]), RowInput(1, [9], 5, [1, 3])]
    join = [RowState(1, GREEDY, prompt, [9])]
    output = runner.launch(StepInput(forks, join, copies=[(2, 3)])).read()
    alone = [
        run_one(make_runner(model), [RowInput(0, [*prompt, token], 0, table(0))], [GREEDY]).token_ids[0]
        for token in (first, 9)
    ]
    assert output.token_ids == alone
