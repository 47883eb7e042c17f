"""The bounded queue: who may come in, and when the others should try again.

Two bounds, over all protocols: requests in flight (a request with n choices counts n times) and prompt tokens that
wait for their first output. Knows counts only: no requests, no HTTP beyond the 503 it raises. Not thread-safe: all
calls come from the event loop.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from ropeway.server.errors import ApiError, invalid

RejectReason = Literal["requests", "tokens", "loading", "engine_restarting", "draining"]

MIN_RETRY_S, MAX_RETRY_S = 1, 120
WINDOW_S = 30.0


class DrainRate:
    """How fast units (slots, tokens) became free lately; idle time does not count.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy_since = clock()
        self._bins: deque[tuple[int, int]] = deque()

    def busy(self) -> None:
        """Something came in while nothing was there: a new measurement begins."""
        self._busy_since = self._clock()
        self._bins.clear()

    def freed(self, units: int) -> None:
        """`units` became free just now."""
        second = int(self._clock())
        if self._bins and self._bins[-1][0] == second:
            units += self._bins.pop()[1]
        self._bins.append((second, units))

    def retry_after(self, units: int) -> int:
        """Whole seconds until `units` more will probably be free, 1 to 120."""
        now = self._clock()
        while self._bins and self._bins[0][0] < now - WINDOW_S:
            self._bins.popleft()
        elapsed = min(now - self._busy_since, WINDOW_S)
        freed = sum(units for _, units in self._bins)
        return min(max(math.ceil(units * elapsed / max(freed, 1)), MIN_RETRY_S), MAX_RETRY_S)


class Ticket:
    """One request's place in the queue. Release it when the last byte is out, whatever happened; `with` does."""

    __slots__ = ("_admission", "_released", "_slots", "_tokens", "_waiting")

    def __init__(self, admission: "Admission", slots: int, tokens: int) -> None:
        self._admission = admission
        self._slots = slots
        self._tokens = tokens
        self._waiting = True
        self._released = False

    def settle(self, prompt_tokens: int) -> None:
        """The prompt is tokenized: its real length replaces the bound that was reserved.

        Raises: ApiError 503 `server_overloaded` if it is longer than reserved and the queue cannot hold it.
        """
        if self._waiting:
            self._admission.resize(self._tokens, prompt_tokens)
            self._tokens = prompt_tokens

    def started(self) -> None:
        """The first output token came: the prompt waits no more. Idempotent."""
        if self._waiting:
            self._waiting = False
            self._admission.free_tokens(self._tokens)

    def release(self) -> None:
        """Gives everything back. Idempotent."""
        if not self._released:
            self._released = True
            self.started()
            self._admission.free_slots(self._slots)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Admission:
    """Counts what is in flight in this process and says no when it is too much.

    Args:
        max_requests: slots; a request with n choices takes n.
        max_tokens: prompt tokens waiting for their first output. A single prompt may be longer: it comes in when no
            other waits.
        on_reject: told the reason of each refusal (for the metrics).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        on_reject: Callable[[RejectReason], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.requests = 0
        """Slots taken."""
        self.tokens = 0
        """Prompt tokens waiting."""
        self._on_reject = on_reject
        self._slot_rate = DrainRate(clock)
        self._token_rate = DrainRate(clock)

    def reserve(self, n: int, prompt_tokens: int = 0) -> Ticket:
        """Takes n slots and room for an upper bound of prompt tokens, before anything costly is done.

        Raises: ApiError 503 `server_overloaded` with Retry-After; 400 if n can never fit.
        """
        if n > self.max_requests:
            raise invalid(f"n is {n}, but this server takes at most {self.max_requests} choices at a time.", "n")
        if self.requests + n > self.max_requests:
            raise self._full("requests", self._slot_rate.retry_after(self.requests + n - self.max_requests))
        self._check_tokens(0, prompt_tokens)
        if self.requests == 0:
            self._slot_rate.busy()
        if self.tokens == 0:
            self._token_rate.busy()
        self.requests += n
        self.tokens += prompt_tokens
        return Ticket(self, n, prompt_tokens)

    def resize(self, reserved: int, tokens: int) -> None:
        """Replaces one ticket's share of the waiting tokens. Raises: ApiError 503, the share stays as it was."""
        if tokens > reserved:
            self._check_tokens(reserved, tokens)
        self.tokens += tokens - reserved

    def free_tokens(self, tokens: int) -> None:
        """Prompt tokens that wait no more."""
        self.tokens -= tokens
        self._token_rate.freed(tokens)

    def free_slots(self, slots: int) -> None:
        """Slots that are free again."""
        self.requests -= slots
        self._slot_rate.freed(slots)

    def _check_tokens(self, reserved: int, tokens: int) -> None:
        others = self.tokens - reserved
        if others > 0 and others + tokens > self.max_tokens:
            raise self._full("tokens", self._token_rate.retry_after(others + tokens - self.max_tokens))

    def _full(self, reason: RejectReason, seconds: int) -> ApiError:
        self._on_reject(reason)
        message = f"The server is overloaded: its queue of {reason} is full. Try again in {seconds} s."
        return ApiError(503, message, code="server_overloaded", headers={"Retry-After": str(seconds)})
