"""The policy alone: when an engine hangs, when it died too often."""

from ropeway.scheduler.messages import Heartbeat
from ropeway.scheduler.watchdog import Limits, PhaseLimit, RestartBudget, Watchdog

LIMITS = Limits(loading=PhaseLimit(silence=10, stall=100), compiling=PhaseLimit(silence=50, stall=500))


def test_silence_is_judged_by_phase() -> None:
    """Guards long compiles: what is silence while loading is none while compiling."""
    dog = Watchdog(LIMITS, 0.0)
    assert dog.complaint(10) is None
    assert dog.complaint(11) == "no heartbeat for 11 s while loading"
    dog.heard(Heartbeat(1, "compiling"), 11)
    assert dog.complaint(61) is None
    assert dog.complaint(62) == "no heartbeat for 51 s while compiling"


def test_loading_may_be_long_but_must_move() -> None:
    """Guards large downloads (progress now and then) and a loader that waits for ever behind a beating thread."""
    dog = Watchdog(LIMITS, 0.0)
    for second in range(0, 400, 5):
        dog.heard(Heartbeat(1, "loading", stage="reading weights", progress=second // 90 / 10), second)
        assert dog.complaint(second) is None
    for second in range(400, 465, 5):
        dog.heard(Heartbeat(1, "loading", stage="reading weights", progress=0.4), second)
    assert dog.complaint(465) == "no progress for 105 s while loading"


def test_stepping_must_move_only_with_work() -> None:
    """Guards an idle engine, and one whose loop turns without ever finishing a step."""
    dog = Watchdog(LIMITS, 0.0)
    dog.ready(step_timeout=5)
    for second in range(100):
        dog.heard(Heartbeat(1, "stepping", steps=7), second)
        assert dog.complaint(second) is None
    for second in range(100, 106):
        dog.heard(Heartbeat(1, "stepping", steps=7, waiting=1), second)
    assert dog.complaint(105) == "no progress for 6 s while stepping"
    dog.heard(Heartbeat(1, "stepping", steps=8, running=1), 106)
    assert dog.complaint(106) is None
    assert dog.complaint(112) == "no heartbeat for 6 s while stepping"


def test_the_budget_is_a_sliding_window() -> None:
    """Guards a server that crashes once a day for years, and ends one that crashes all the time."""
    budget = RestartBudget(restarts=2, window=10)
    assert [budget.spend(now) for now in (0, 1, 2)] == [True, True, False]
    assert not budget.spend(10.5)  # still two in (0.5, 10.5]
    daily = RestartBudget(restarts=2, window=10)
    assert all(daily.spend(now) for now in range(0, 1000, 6))
