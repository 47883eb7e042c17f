"""The share of prefill, with a device whose costs the test makes up."""

from collections.abc import Callable

import pytest

from ropeway.scheduler.pace import FLOOR, PROBE_STEPS, SOON, STRETCH, Pace

DECODE, TOKEN = 5.5e-3, 28e-6
"""Seconds of a decode step and per prompt token: an 8B model's on a large GPU."""
Cost = Callable[[int], float]


def additive(tokens: int) -> float:
    """Prompt tokens come on top."""
    return DECODE + TOKEN * tokens


def hidden(tokens: int) -> float:
    """Prompt tokens cost nothing until the arithmetic takes longer than reading the weights."""
    return max(DECODE, TOKEN * tokens)


def drive(pace: Pace, cost: Cost, steps: int, most: int = 10**6) -> list[tuple[int, float]]:
    """(share, seconds) of mixed steps with as many prompt tokens as the pace allows."""
    seen = []
    for _ in range(steps):
        tokens = min(pace.share, most)
        pace.observe(48, tokens, cost(tokens))
        seen.append((tokens, cost(tokens)))
    return seen


costs = pytest.mark.parametrize("cost", [additive, hidden])


@costs
def test_mixed_steps_take_a_small_multiple_of_others(cost: Cost) -> None:
    """Guards gaps between tokens: the share settles where a mixed step takes `STRETCH` decode steps, and on its way
    there it never overshoots by much."""
    pace = Pace()
    pace.observe(0, 8000, TOKEN * 8000)
    pace.observe(48, 0, cost(0))
    seen = drive(pace, cost, 2 * PROBE_STEPS)
    assert max(seconds for _, seconds in seen) < 3.5 * DECODE
    settled = [seconds for tokens, seconds in seen[PROBE_STEPS // 2 :] if tokens]
    assert min(settled) > 0.9 * STRETCH * DECODE and max(settled) < 1.2 * STRETCH * DECODE


@costs
def test_a_cold_start_learns_by_itself(cost: Cost) -> None:
    """Guards the first long prompt: nothing is known, so the share is small, and it grows to its place."""
    pace = Pace()
    assert pace.share == FLOOR
    seen = drive(pace, cost, PROBE_STEPS + SOON)
    assert [tokens for tokens, _ in seen[: SOON + 1]] == [FLOOR] * SOON + [0]
    assert seen[-1][1] > 0.8 * STRETCH * DECODE and max(seconds for _, seconds in seen) < 3.5 * DECODE


def test_small_chunks_say_nothing_about_large_ones() -> None:
    """Guards against a stall: a thousand chunks that cost nothing visible, then a long prompt."""
    pace = Pace()
    drive(pace, hidden, 1000, most=60)
    assert hidden(pace.share) < 3 * DECODE


def test_the_share_follows_the_costs() -> None:
    """Guards long contexts and other loads: costs change, the share does too; decode time is measured in between."""
    pace = Pace()
    drive(pace, additive, 100)
    before = pace.share
    slower = drive(pace, lambda tokens: DECODE + 3 * TOKEN * tokens, 100)
    assert slower[-1][0] < before / 2
    rows = drive(pace, lambda tokens: 3 * DECODE + 3 * TOKEN * tokens, 400)
    assert rows[-1][0] > 2.5 * slower[-1][0]


def test_one_slow_step_is_no_trend() -> None:
    """Guards against a compiled kernel or a pause that is taken for the price of a step."""
    pace = Pace()
    drive(pace, additive, 60)
    before = pace.share
    pace.observe(48, 0, 2.0)
    assert before < pace.share < 1.6 * before
    pace.observe(48, before, 2.0)
    assert pace.share > before / 2


def test_prompts_always_end() -> None:
    """Guards progress: however slow the device is at prompts, some tokens ride along."""
    pace = Pace()
    seen = drive(pace, lambda tokens: DECODE + tokens, 3 * PROBE_STEPS)
    assert sorted({tokens for tokens, _ in seen}) == [0, FLOOR]
    assert sum(tokens == 0 for tokens, _ in seen) == 3


def test_what_every_mixed_step_costs_makes_no_small_pieces() -> None:
    """Guards against a collapse: steps without a CUDA graph took 20 ms more whatever was in them, so the pieces became
    smaller, and so dearer, until a prompt came 16 tokens at a time."""
    pace = Pace()
    pace.observe(0, 8000, TOKEN * 8000)
    pace.observe(48, 0, DECODE)
    seen = drive(pace, lambda tokens: additive(tokens) + 0.02 * (tokens > 0), 100)
    assert min(tokens for tokens, _ in seen if tokens) > 90


def test_many_who_wait_count_as_few_who_decode() -> None:
    """Guards starts and bursts: 31 rows that decode must not keep 225 prompts waiting until they have ended. One long
    prompt beside many rows gains nothing."""
    pace = Pace()
    drive(pace, additive, 60)
    assert pace.share_beside(48, 2) == pace.share_beside(48, 48) == pace.share
    assert pace.share_beside(32, 224) == 7 * pace.share
    assert pace.share_beside(0, 5) >= pace.share
