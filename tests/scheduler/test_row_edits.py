"""Rows whose scores are edited between forward and sampler, on the real engine: theirs alone, the same everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from test_same_tokens import VOCAB, Answers, Setup, _only, build, model, requests, run
from transformers import LlamaForCausalLM

from ropeway.kernels.errors import EditError
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.messages import AddRequest, EditSpec, RowOutput
from ropeway.scheduler.row import Row
from ropeway.scheduler.row_edits import stop_reason

__all__ = ["model"]  # the fixture


@dataclass
class Shift:
    """Favours what follows the newest token, and depends on how long the row is; ends after `most` output tokens."""

    num_prompt: int
    most: int = 1000
    fail_at: int = 1000
    last: float = 0.0
    """What every score becomes when it would fail, unless that is 0."""
    waits: int = 0
    """Times it is asked before it is ready."""

    @property
    def ready(self) -> bool:
        self.waits -= 1
        return self.waits < 0

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        assert scores.shape == (VOCAB,) and scores.dtype == torch.float32
        if len(token_ids) - self.num_prompt >= self.fail_at:
            if not self.last:
                raise EditError("It was too much.")
            scores.fill_(self.last)
        scores[: token_ids[-1] // 2] = -torch.inf
        scores[(token_ids[-1] + len(token_ids)) % VOCAB] += 3

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        return "enough" if len(token_ids) - self.num_prompt >= self.most else None


BUILDERS = {"shift": lambda args, row: Shift(row.num_prompt, **args)}


def edited(request: AddRequest, **args: Any) -> AddRequest:
    return msgspec.structs.replace(request, edits=[EditSpec("shift", args)])


def mixed(every: int = 2, **args: Any) -> list[AddRequest]:
    return [edited(one, **args) if one.request_id % every == 0 else one for one in requests()]


@pytest.fixture(scope="module")
def alone(model: LlamaForCausalLM) -> Answers:
    """What each choice of each request gets with the engine to itself."""
    answers: Answers = {}
    for request in mixed():
        for choice in request.choices:
            engine = build(model, Setup(caching=False), BUILDERS)
            answers |= run(engine, {0: [_only(request, choice.index)]})
    return answers


SETUPS = [
    Setup(layout, lag, chunk, blocks, rows)
    for layout in ("packed", "padded")
    for lag in (0, 1)
    for chunk, blocks, rows in [(512, 400, 16), (24, 48, 16)]
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_edits_change_their_own_rows_alone(model: LlamaForCausalLM, alone: Answers, setup: Setup) -> None:
    """Guards lines of edits against each other: chunks, preemption, lag and neighbours with other needs."""
    engine = build(model, setup, BUILDERS)
    arrivals = {at: mixed()[at::5] for at in range(5)}
    assert run(engine, arrivals) == alone
    assert (engine.scheduler.stats.preemptions > 0) == (setup.blocks < 100)


def test_edits_are_seen(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards the tests above: a row without its edit says something else, the rows beside it do not."""
    plain = run(build(model, Setup()), {0: requests()})
    changed = {row for row in alone if alone[row] != plain[row]}
    assert changed and {number for number, _ in changed} <= set(range(0, 14, 2))
    assert len(changed) > 5


def test_resumed_after_a_crash(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards edits that are built again: their first call comes with the tokens that were sent before."""
    for request in mixed():
        tokens, reason = alone[request.request_id, 0]
        if len(tokens) < 2 or not request.edits:
            continue
        sent = tokens[: len(tokens) // 2]
        resumed = _only(request, 0)
        resumed.choices[0].output_ids.extend(sent)
        answers = run(build(model, Setup(lag=1, chunk=16), BUILDERS), {0: [resumed]})
        assert answers == {(request.request_id, 0): (tokens[len(sent) :], reason)}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_failing_edit_ends_its_own_row(model: LlamaForCausalLM, alone: Answers, lag: int) -> None:
    """Guards everybody else: an exception in an edit is that row's error, and no token comes after it."""
    broken = [edited(one, fail_at=2) if one.request_id == 4 else one for one in mixed()]
    answers = run(build(model, Setup(lag=lag), BUILDERS), {0: broken})
    assert answers.pop((4, 0)) == (alone[4, 0][0][:2], "error")
    assert answers == {row: answer for row, answer in alone.items() if row != (4, 0)}


@pytest.mark.parametrize(("last", "reason"), [(-torch.inf, "refused"), (torch.nan, "error"), (torch.inf, "error")])
def test_nothing_to_choose(model: LlamaForCausalLM, alone: Answers, last: float, reason: str) -> None:
    """Guards blame: a row whose edits ban every token was asked the impossible; no numbers are a fault."""
    broken = [edited(one, fail_at=2, last=last) if one.request_id == 4 else one for one in mixed()]
    answers = run(build(model, Setup(lag=1), BUILDERS), {0: broken})
    assert answers.pop((4, 0)) == (alone[4, 0][0][:2], reason)
    assert answers == {row: answer for row, answer in alone.items() if row != (4, 0)}


@pytest.mark.parametrize("lag", [0, 1])
def test_an_edit_ends_its_row(model: LlamaForCausalLM, alone: Answers, lag: int) -> None:
    """Guards stopping criteria: the token that met it is the last, and the reason is told."""
    engine = build(model, Setup(lag=lag), BUILDERS)
    outputs = answer(engine, edited(requests()[0], most=2))
    assert [id for output in outputs for id in output.token_ids] == alone[0, 0][0][:2]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "enough")
    assert outputs[-1].stop_token_id is None


def answer(engine: Engine, request: AddRequest) -> list[RowOutput]:
    engine.add(0, request)
    outputs: list[RowOutput] = []
    while engine.has_work:
        outputs += engine.step(0.0).get(0, [])
    return outputs


def test_a_resumed_row_that_had_ended(model: LlamaForCausalLM) -> None:
    """Guards a crash between the last token and its end: no token more."""
    request = edited(_only(requests()[0], 0), most=2)
    request.choices[0].output_ids.extend([1, 2])
    (output,) = answer(build(model, Setup(), BUILDERS), request)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([], "stop", "enough")


def test_an_edit_that_cannot_be_built(model: LlamaForCausalLM) -> None:
    """Guards the engine against what builds edits, and against kinds that it does not know."""
    for spec in (EditSpec("shift", {"nothing": 1}), EditSpec("unknown")):
        engine = build(model, Setup(), BUILDERS)
        (output,) = answer(engine, msgspec.structs.replace(requests()[0], edits=[spec]))
        assert output.finish_reason == "error" and output.error and "Preparing" in output.error
        assert not engine.scheduler.num_unfinished


def test_a_row_waits_for_its_edit_and_nobody_else_does(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards `ready`: others pass a row whose edit is still being made, and it gets the same tokens later."""
    slow = [edited(one, waits=40) if one.request_id == 0 else one for one in mixed()]
    engine = build(model, Setup(), BUILDERS)
    assert run(engine, {0: slow}) == alone
    assert engine.scheduler.stats.reasons["edit not ready"] == 40


def test_the_sentences_of_errors() -> None:
    """Guards what a client reads when a criterion raises."""

    class Broken(Shift):
        def stop_reason(self, token_ids: Sequence[int]) -> str | None:
            raise ValueError("what?")

    with pytest.raises(EditError, match=r"Asking whether this request ends failed: ValueError: what\?"):
        stop_reason([Broken(0)], [1])


def test_rows_with_edits_are_read_first() -> None:
    """Guards the lag: their ids must all be known when they are planned."""
    from ropeway.scheduler.row import add_edits, rows_of

    plain, changed = (rows_of(request, 0, 100)[0] for request in (requests()[0], edited(requests()[0])))
    add_edits(changed, [EditSpec("shift")], BUILDERS)
    add_edits(plain, [], BUILDERS)
    assert isinstance(plain, Row) and (plain.max_in_flight, changed.max_in_flight) == (1, 0)
