"""Whatever arrives whenever, in whatever memory: every choice gets the tokens that it would get alone. And the loop."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import event, given, note, settings
from scenarios import Scenario, check, crowds, request, scenarios

from ropeway.kernels.step import StepInput, StepOutput
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import AbortRequest, ChoiceStart, RowOutput
from ropeway.scheduler.scheduler import Scheduler


@settings(max_examples=600, deadline=None, derandomize=True)
@given(scenarios())
def test_same_tokens_whatever_the_neighbours(scenario: Scenario) -> None:
    """Guards the product: no interleaving, chunk, block, copy, preemption, abort, crash or lag may change a token."""
    note(repr(scenario))
    run = check(scenario)
    event(f"preemptions: {min(run.preemptions, 3)}")
    event(f"copies: {min(run.forks, 3)}")
    event(f"hits: {run.scheduler.stats.prefix_hits > 0}")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(crowds())
def test_preemption_changes_no_token(scenario: Scenario) -> None:
    """Guards recompute: blocks of a preempted row go to others while its last steps may still be in flight."""
    note(repr(scenario))
    run = check(scenario)
    event(f"preemptions: {min(run.preemptions, 5)}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=2000, deadline=None)
@given(scenarios())
def test_same_tokens_in_thousands_of_scenarios(scenario: Scenario) -> None:
    """The same with fresh random scenarios in every run."""
    note(repr(scenario))
    check(scenario)


# ---- the loop itself ----


class Tape:
    """A runner that notes what happens when. Every row samples token 5."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def launch(self, step: StepInput) -> "TapeFlight":
        self.events.append("launch")
        return TapeFlight(self, step)


@dataclass
class TapeFlight:
    tape: Tape
    step: StepInput

    def read(self) -> StepOutput:
        self.tape.events.append("read")
        count = len(self.step.rows)
        return StepOutput([5] * count, [True] * count, computed_slots=8)


def small_engine(lag: Literal[0, 1]) -> tuple[Engine, Tape]:
    tape = Tape()
    return Engine(Scheduler(Limits(4, 16, 100), BlockPool(11, 4)), tape, lag), tape


@pytest.mark.parametrize(
    ("lag", "events"),
    [(0, "launch read launch read launch read"), (1, "launch launch read launch read read")],
)
def test_with_lag_a_step_is_launched_before_the_last_is_read(lag: Literal[0, 1], events: str) -> None:
    """Guards the overlap of host and device, and that the last step is read although nothing follows it."""
    engine, tape = small_engine(lag)
    assert not engine.has_work
    engine.add(3, request(1, [1, 2, 3], max_tokens=3))
    received: list[RowOutput] = []
    while engine.has_work:
        received += engine.step(0.0).get(3, [])
    assert tape.events == events.split()
    assert [output.token_ids for output in received] == [[5], [5], [5]]
    assert received[-1].finish_reason == "length"


def test_the_pace_learns_from_the_devices_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the share of prefill: while a launch compiled a kernel the device went ahead, so a step of 8,192 tokens
    seemed to have taken nothing, and from then on every mixed step was filled to the brim."""
    engine, _ = small_engine(1)
    seen: list[tuple[int, int, float]] = []
    monkeypatch.setattr(engine.scheduler.pace, "observe", lambda *measured: seen.append(measured))
    times = iter([0.004, 0.002, 0.0])
    read = TapeFlight.read
    monkeypatch.setattr(TapeFlight, "read", lambda flight: replace(read(flight), seconds=next(times)))
    engine.add(0, request(1, [1, 2, 3], max_tokens=3))
    while engine.has_work:
        engine.step(0.0)
    assert seen[:2] == [(0, 3, 0.004), (1, 0, 0.002)]
    assert seen[2][:2] == (1, 0) and 0 < seen[2][2] < 60, "measured here: that device has no clock"


def test_an_engine_with_only_a_dead_rows_step_in_flight_reads_it() -> None:
    """Guards against a flight that nobody reads: the device's memory of it would stay."""
    engine, tape = small_engine(1)
    engine.add(0, request(1, [1, 2, 3]))
    engine.step(0.0)
    engine.abort(0, AbortRequest(1, 1))
    assert engine.has_work
    assert engine.step(0.0) == {}
    assert tape.events == ["launch", "read"]
    assert not engine.has_work


def test_a_request_that_never_fits_is_answered_per_choice() -> None:
    """Guards clients that would wait for ever: the next step tells them, though there is nothing to compute."""
    engine, tape = small_engine(0)
    engine.add(2, request(1, [1] * 50, n=2))
    assert engine.has_work
    outputs = engine.step(0.0)[2]
    assert [(output.choice, output.finish_reason) for output in outputs] == [(0, "error"), (1, "error")]
    assert all(output.error and "50 tokens" in output.error for output in outputs)
    assert (tape.events, engine.has_work) == ([], False)


@pytest.mark.parametrize(
    "invalid",
    [
        {"prompt_ids": []},
        {"prompt_ids": [1, -1]},
        {"max_tokens": 0},
        {"choices": []},
        {"choices": [ChoiceStart(0), ChoiceStart(0)]},
        {"request_id": 1},
    ],
    ids=str,
)
def test_an_invalid_request_is_refused_alone(invalid: dict[str, Any]) -> None:
    """Guards the other clients: what a worker failed to validate once ended the engine for everybody."""
    engine, _ = small_engine(0)
    engine.add(0, request(1, [1, 2, 3], max_tokens=2))
    bad = msgspec.structs.replace(request(2, [1, 2, 3]), **invalid)
    engine.add(0, bad)
    outputs: list[RowOutput] = []
    while engine.has_work:
        outputs += engine.step(0.0).get(0, [])
    refused = [output for output in outputs if output.finish_reason == "error"]
    assert [output.choice for output in refused] == [choice.index for choice in bad.choices]
    assert all(output.request_id == bad.request_id and output.error for output in refused)
    good = [output for output in outputs if output.request_id == 1 and output.finish_reason != "error"]
    assert [output.token_ids for output in good] == [[5], [5]]


def test_counters_tell_real_from_computed_tokens() -> None:
    """Guards the padding ratio and the throughput that metrics show."""
    engine, _ = small_engine(0)
    engine.add(0, request(1, [1, 2, 3], max_tokens=2))
    engine.add(0, request(2, [1, 2], max_tokens=2))
    while engine.has_work:
        engine.step(0.0)
    assert (engine.stats.steps, engine.stats.real_slots, engine.stats.computed_slots) == (2, 7, 16)
    assert engine.stats.last_step_seconds > 0
    assert (engine.scheduler.stats.prompt_tokens, engine.scheduler.stats.generation_tokens) == (5, 4)
