"""The bounded queue: what fits, what does not, and when to come back."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ropeway.scheduler.admission_table import AdmissionTable, Column
from ropeway.server.admission import MAX_RETRY_S, Admission, DrainRate
from ropeway.server.errors import ApiError


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reasons() -> list[str]:
    return []


@pytest.fixture
def admission(clock: Clock, reasons: list[str]) -> Admission:
    return Admission(4, 100, reasons.append, clock)


def retry_after(caught: pytest.ExceptionInfo[ApiError]) -> int:
    assert caught.value.status == 503 and caught.value.code == "server_overloaded"
    return int(caught.value.headers["Retry-After"])


def test_n_counts_n_times(admission: Admission, reasons: list[str]) -> None:
    """Guards the batch: a request with n choices is n rows, not one."""
    ticket = admission.reserve(3)
    admission.reserve(1)
    with pytest.raises(ApiError) as caught:
        admission.reserve(1)
    assert 1 <= retry_after(caught) <= MAX_RETRY_S
    assert reasons == ["requests"]
    ticket.release()
    admission.reserve(3)


def test_impossible_n_is_the_callers_mistake(admission: Admission) -> None:
    """Guards clients that retry for ever what can never fit."""
    with pytest.raises(ApiError) as caught:
        admission.reserve(5)
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_release_is_idempotent(admission: Admission) -> None:
    """Guards the counters: stream and handler may both release; a negative count would let everybody in."""
    ticket = admission.reserve(2, 30)
    ticket.started()
    ticket.release()
    ticket.release()
    ticket.started()
    ticket.settle(50)
    assert (admission.requests, admission.tokens) == (0, 0)


def test_with_releases_on_errors(admission: Admission) -> None:
    """Guards against slots lost to an exception between reserving and answering."""
    with pytest.raises(RuntimeError), admission.reserve(2, 30):
        raise RuntimeError
    assert (admission.requests, admission.tokens) == (0, 0)


def test_settling_corrects_the_bound(admission: Admission) -> None:
    """Guards the token bound: what was reserved before tokenizing is replaced, not added to."""
    ticket = admission.reserve(1, 90)
    with pytest.raises(ApiError):
        admission.reserve(1, 20)
    assert (admission.requests, admission.tokens) == (1, 90)
    ticket.settle(10)
    other = admission.reserve(1, 20)
    assert admission.tokens == 30
    with pytest.raises(ApiError) as caught:
        other.settle(95)
    assert retry_after(caught)
    other.release()
    assert admission.tokens == 10


def test_started_prompts_wait_no_more(admission: Admission) -> None:
    """Guards long answers: once a prompt is computed its tokens leave the queue, its slot stays taken."""
    ticket = admission.reserve(1, 100)
    ticket.started()
    assert (admission.requests, admission.tokens) == (1, 0)
    admission.reserve(1, 100)


def test_one_long_prompt_fits_an_empty_queue(admission: Admission) -> None:
    """Guards long prompts: a prompt longer than the bound is served when no other waits, never refused for ever."""
    ticket = admission.reserve(1)
    ticket.settle(5000)
    with pytest.raises(ApiError):
        admission.reserve(1, 1)
    ticket.release()
    admission.reserve(1, 1)


def test_retry_after_follows_the_drain_rate(clock: Clock) -> None:
    """Guards Retry-After: twice the rate, half the wait; idle time is no measurement; always 1 to 120."""
    freed = 100
    rate = DrainRate(lambda: freed, clock)
    clock.now += 500
    rate.look(idle=True)
    for _ in range(10):
        clock.now += 1
        freed += 2
        rate.look()
    assert rate.retry_after(20) == 10
    assert rate.retry_after(1) == 1
    assert rate.retry_after(10**9) == MAX_RETRY_S
    clock.now += 25  # the first five of ten seconds with two each have left the window of 30
    rate.look()
    assert rate.retry_after(10) == round(10 * 30 / 10)


def test_retry_after_counts_what_other_workers_freed(clock: Clock) -> None:
    """Guards Retry-After with several workers: the queue drains through all of them."""
    table = AdmissionTable.private()
    admission = Admission(4, 100, clock=clock, table=table)
    admission.reserve(4)
    clock.now += 20
    table.add(0, Column.FREED_SLOTS, 10)  # as another worker's line would
    with pytest.raises(ApiError) as caught:
        admission.reserve(4)
    assert retry_after(caught) == 8


def test_a_stuck_server_asks_for_patience(clock: Clock, admission: Admission) -> None:
    """Guards a server that frees nothing: the wait grows with the time it has been stuck."""
    admission.reserve(4)
    clock.now += 20
    with pytest.raises(ApiError) as caught:
        admission.reserve(2)
    assert retry_after(caught) == 40


def two_workers(tmp_path: Path, kind: type[AdmissionTable] = AdmissionTable) -> tuple[Admission, Admission]:
    """Two API workers' views of one queue of 4 requests and 100 tokens."""
    AdmissionTable.create(str(tmp_path), 2)
    first, second = (Admission(4, 100, table=kind.open(str(tmp_path)), line=line) for line in range(2))
    return first, second


def test_workers_share_the_bounds(tmp_path: Path) -> None:
    """Guards against a queue per worker: what one took the other cannot have, and each gives back its own."""
    first, second = two_workers(tmp_path)
    ticket = first.reserve(3, 90)
    with pytest.raises(ApiError, match="requests"):
        second.reserve(2)
    with pytest.raises(ApiError, match="tokens"):
        second.reserve(1, 20)
    other = second.reserve(1)
    with pytest.raises(ApiError, match="tokens"):
        other.settle(20)
    assert (first.requests, second.requests) == (3, 1)
    ticket.release()
    assert (first.requests, first.tokens, second.requests) == (0, 0, 1)
    second.reserve(3, 90)


class Overtaken(AdmissionTable):
    """Between a worker's look at the sums and its own entry, `others` run."""

    others: Callable[[], None] = staticmethod(lambda: None)

    def add(self, line: int, column: Column, amount: int) -> None:
        others, Overtaken.others = Overtaken.others, staticmethod(lambda: None)
        others()
        super().add(line, column, amount)


def test_the_race_costs_one_request(tmp_path: Path) -> None:
    """Guards the promised bound: however often another worker overtakes, it adds what fits and never more."""
    first, second = two_workers(tmp_path, Overtaken)
    first.reserve(3)

    def overtake() -> None:
        second.reserve(1)
        with pytest.raises(ApiError, match="requests"):
            second.reserve(1)

    Overtaken.others = staticmethod(overtake)
    first.reserve(1)
    assert first.requests + second.requests == 4 + 1
    with pytest.raises(ApiError, match="requests"):
        first.reserve(1)
