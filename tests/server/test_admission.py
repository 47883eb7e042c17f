"""The bounded queue: what fits, what does not, and when to come back."""

import pytest

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
    rate = DrainRate(clock)
    clock.now += 500
    rate.busy()
    for _ in range(10):
        clock.now += 1
        rate.freed(2)
    assert rate.retry_after(20) == 10
    assert rate.retry_after(1) == 1
    assert rate.retry_after(10**9) == MAX_RETRY_S
    clock.now += 25  # the first of ten seconds with two each have left the window of 30
    assert rate.retry_after(10) == round(10 * 30 / 12)


def test_a_stuck_server_asks_for_patience(clock: Clock, admission: Admission) -> None:
    """Guards a server that frees nothing: the wait grows with the time it has been stuck."""
    admission.reserve(4)
    clock.now += 20
    with pytest.raises(ApiError) as caught:
        admission.reserve(2)
    assert retry_after(caught) == 40
