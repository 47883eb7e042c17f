"""The share of prefill, with a device whose costs the test makes up."""

import random
from collections.abc import Callable

import pytest

from ropeway.scheduler.pace import (
    BURST,
    FEW,
    FLOOR,
    GAP,
    LONGEST,
    MANY,
    PROBE_STEPS,
    SHORTEST,
    SMOOTH,
    SOON,
    TURN,
    Goal,
    Pace,
)

DECODE, TOKEN = 5.5e-3, 20e-6
"""Seconds of a decode step and per prompt token: an 8B model's on a large GPU."""
BUDGET = 8192
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


def settled(cost: Cost = additive, goal: Goal = "latency") -> Pace:
    """A pace that knows the device."""
    pace = Pace(goal=goal)
    pace.observe(0, 8000, cost(8000))
    drive(pace, cost, 2 * PROBE_STEPS)
    pace.observe(48, 0, cost(0))
    return pace


def crowd(pace: Pace, decoding: int, waiting: int, steps: int, cost: Cost = additive) -> list[int]:
    """Prompt tokens of the next steps, where prompts never end."""
    seen = []
    for _ in range(steps):
        tokens = pace.share_beside(decoding, waiting, BUDGET)
        pace.launched(tokens)
        pace.observe(decoding, tokens, cost(tokens))
        seen.append(tokens)
    return seen


costs = pytest.mark.parametrize("cost", [additive, hidden])


@costs
def test_mixed_steps_take_what_nobody_minds(cost: Cost) -> None:
    """Guards gaps between tokens and the use of the device: the share settles where a mixed step takes `GAP`, and on
    its way there it never overshoots by much."""
    pace = Pace()
    pace.observe(0, 8000, TOKEN * 8000)
    pace.observe(48, 0, cost(0))
    seen = drive(pace, cost, 2 * PROBE_STEPS)
    assert max(seconds for _, seconds in seen) < 1.3 * GAP
    late = [seconds for tokens, seconds in seen[PROBE_STEPS // 2 :] if tokens]
    assert min(late) > 0.9 * GAP and max(late) < 1.1 * GAP


@pytest.mark.parametrize(
    ("decode", "token", "longest"),
    [
        (0.9e-3, 4e-6, LONGEST * 0.9e-3),
        (7e-3, 0.2e-3, GAP),
        (60e-3, 1.5e-3, SHORTEST * 60e-3),
    ],
    ids=["a small model on a GPU", "a tiny one on a CPU", "a small one on a CPU"],
)
def test_gaps_on_other_devices(decode: float, token: float, longest: float) -> None:
    """Guards devices that nobody tuned for: tokens neither come in fits nor do prompts take forever."""
    pace = Pace()
    pace.observe(0, 512, token * 512)
    pace.observe(4, 0, decode)
    seen = drive(pace, lambda tokens: decode + token * tokens, 100)
    assert max(seconds for _, seconds in seen) < 1.1 * longest
    assert seen[-1][1] > 0.9 * longest


@costs
def test_a_cold_start_learns_by_itself(cost: Cost) -> None:
    """Guards the first long prompt: nothing is known, so the share is small, and it grows to its place."""
    pace = Pace()
    assert pace.share == FLOOR
    seen = drive(pace, cost, 2 * PROBE_STEPS + SOON)
    assert [tokens for tokens, _ in seen[: SOON + 1]] == [FLOOR] * SOON + [0]
    assert seen[-1][1] > 0.8 * GAP and max(seconds for _, seconds in seen) < 1.3 * GAP


@pytest.mark.parametrize("chunks", [40, 1000])
def test_small_chunks_say_nothing_about_large_ones(chunks: int) -> None:
    """Guards against a stall: chunks that cost nothing visible, then a long prompt."""
    pace = Pace()
    pace.observe(0, 8000, TOKEN * 8000)
    drive(pace, hidden, chunks, most=60)
    assert hidden(pace.share) < 1.3 * GAP


def test_the_share_follows_the_costs() -> None:
    """Guards long contexts and other loads: costs change, the share does too; decode time is measured in between."""
    pace = Pace()
    drive(pace, additive, 100)
    before = pace.share
    slower = drive(pace, lambda tokens: DECODE + 3 * TOKEN * tokens, 20)
    assert slower[10][1] < 1.2 * GAP and slower[-1][0] < before / 2
    rows = drive(pace, lambda tokens: 3 * DECODE + 3 * TOKEN * tokens, 400)
    assert rows[-1][1] == pytest.approx(SHORTEST * 3 * DECODE, rel=0.2)


def test_one_slow_step_is_no_trend() -> None:
    """Guards against a compiled kernel or a pause that is taken for the price of a step."""
    pace = settled()
    before = pace.share
    pace.observe(48, 0, 2.0)
    assert 0.7 * before < pace.share < 1.6 * before
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
    assert min(tokens for tokens, _ in seen if tokens) > 200


@costs
def test_many_who_wait_get_larger_steps(cost: Cost) -> None:
    """Guards starts and bursts: 32 rows that decode must not keep 224 prompts waiting until they have ended, nor be
    held up for long. One long prompt beside one stream is no burst."""
    pace = settled(cost)
    share = pace.share_beside(32, 224, BUDGET)
    assert share > 1.5 * pace.share and cost(share) == pytest.approx(BURST, rel=0.1)
    assert pace.share_beside(64, 64 // MANY, BUDGET) == share
    assert pace.share_beside(64, 64 // MANY - 1, BUDGET) == pace.share
    assert pace.share_beside(1, 1, BUDGET) == pace.share
    assert pace.share_beside(32, 224, 100) == 100


@pytest.mark.parametrize(("decode", "tokens"), [(20e-3, (LONGEST - 1) * 20), (60e-3, BUDGET)])
def test_many_who_wait_for_a_slow_device_get_larger_steps_too(decode: float, tokens: float) -> None:
    """Guards smaller GPUs and CPUs: 32 prompts at once took a CPU a fifth longer in steps of six decode steps' time."""
    pace = Pace()
    pace.observe(0, 500, 500e-3)
    pace.observe(8, 0, decode)
    assert pace.share_beside(8, 24, BUDGET) == pytest.approx(tokens, abs=1)


def test_a_burst_at_the_very_start() -> None:
    """Guards the first prompts of all, when no step without them was measured yet."""
    pace = Pace()
    assert pace.share_beside(32, 224, BUDGET) == FLOOR
    pace.observe(0, 8000, TOKEN * 8000)
    assert pace.share_beside(32, 224, BUDGET) == int(BURST / TOKEN)


@costs
@pytest.mark.parametrize(("decoding", "waiting"), [(48, 1), (48, 48 // FEW), (2, 1)])
def test_few_take_turns_with_the_others(cost: Cost, decoding: int, waiting: int) -> None:
    """Guards the others' throughput: two clients with one long prompt after the other took 60% of the time from 48
    streams, and made every gap 2.5 times as long."""
    pace = settled(cost)
    tokens = crowd(pace, decoding, waiting, 600, cost)
    extra = sum(cost(count) - DECODE for count in tokens)
    assert 0.9 / (1 + TURN) < extra / sum(map(cost, tokens)) < 1.1 / (1 + TURN)
    assert sorted(map(cost, tokens))[len(tokens) // 2] == DECODE


def test_some_who_wait_take_no_turns() -> None:
    """Guards first tokens: more than a few who wait get a chunk in every step."""
    pace = settled()
    assert min(crowd(pace, 48, 48 // FEW + 1, PROBE_STEPS)) > 900


def test_whoever_optimizes_for_throughput_gives_prompts_whole_steps() -> None:
    """Guards batches that nobody reads along, from the first step on."""
    pace = Pace(goal="throughput")
    for _ in range(2 * PROBE_STEPS):
        assert pace.share_beside(48, 1, BUDGET) == BUDGET
        pace.launched(BUDGET)
        pace.observe(48, BUDGET, additive(BUDGET))


@costs
def test_smoothness_keeps_every_gap_below_three_decode_steps(cost: Cost) -> None:
    """Guards voices and other steady readers: nobody who comes, one or a crowd, holds the others up, and prompts still
    get all that such a gap has room for."""
    pace = settled(cost, "smoothness")
    for waiting in (1, 2, 8, 200):
        gaps = [cost(tokens) for tokens in crowd(pace, 48, waiting, 3 * PROBE_STEPS, cost)]
        assert max(gaps) < 3 * cost(0)
        assert max(gaps) == pytest.approx(SMOOTH * cost(0), rel=0.05)


def test_short_prompts_that_come_one_by_one_are_not_held_up() -> None:
    """Guards the first token of a row that takes the place of one that ended."""
    pace = settled()
    for _ in range(20):
        assert pace.share_beside(48, 1, BUDGET) > 128
        pace.launched(128)


def test_a_chunk_ends_where_a_captured_size_does() -> None:
    """Guards against pads: 530 tokens took a step of 640."""
    pace = Pace([128, 512, 640, 1024, 1280, 2048])
    pace.observe(0, 8000, TOKEN * 8000)
    pace.observe(48, 0, DECODE)
    share = pace.share
    assert 970 <= share <= 980
    assert pace.share_beside(40, 2, BUDGET) == 640 - 40
    assert pace.share_beside(60, 3, BUDGET) == 1024 - 60
    assert pace.share_beside(400, 20, BUDGET) == 1280 - 400
    assert pace.share_beside(1200, 60, BUDGET) == 2048 - 1200, "not worth its launches"
    assert pace.share_beside(3200, 160, BUDGET) == share, "larger steps have no pads"
    assert pace.share_beside(100, 400, BUDGET) == 2048 - 100
    assert pace.share_beside(60, 3, 100) == 100


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves(seed: int) -> None:
    """Guards both sides, whatever the device and whoever comes: prompts that wait go on every few steps, and unless
    many wait no gap is much longer than it should be."""
    rng = random.Random(seed)
    pace = Pace(sorted(rng.sample(range(64, 2048), 8)))
    decode, token = 10 ** rng.uniform(-3, -1), 10 ** rng.uniform(-5.5, -3)
    longest = max(SHORTEST * decode, min(GAP, LONGEST * decode))
    since = 0
    for step in range(1500):
        decoding, waiting = rng.choice([1, 4, 30, 200]), rng.choice([1, 2, 8, 60])
        tokens = pace.share_beside(decoding, waiting, 4096)
        assert 0 <= tokens <= 4096
        used = rng.choice([tokens, tokens, min(tokens, 50)])
        seconds = rng.uniform(0.9, 1.1) * (decode + token * used)
        if step > 300 and (waiting == 1 or decoding > MANY * waiting):
            assert seconds < max(1.6 * longest, 1.2 * (decode + 2 * FLOOR * token))
        pace.launched(used)
        pace.observe(decoding, used, seconds)
        since = 0 if tokens else since + 1
        assert since <= TURN * LONGEST
