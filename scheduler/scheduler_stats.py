"""What the scheduler counts. Plain data; whoever records metrics reads it once per step."""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ropeway.scheduler.plan import Reason
from ropeway.scheduler.row import Row


class RowTimes(NamedTuple):
    """Seconds of a row's life."""

    queue: float
    """From its arrival until it first joined the batch."""
    prefill: float
    """From then to its first token."""
    decode: float
    """From then to its last token."""

    @classmethod
    def of(cls, row: Row, now: float) -> "RowTimes":
        """Of a row whose last token has just been read."""
        return cls(row.admitted - row.arrival, row.first_token - row.admitted, now - row.first_token)


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start, in tokens where no other unit is named."""

    preemptions: int = 0
    prompt_tokens: int = 0
    """Of admitted requests, computed or found in the cache; shared by all choices of a request."""
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache at admission."""
    prefix_hits: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    """How often a row was not in a step that it might have been in."""
    ended: deque[RowTimes] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of rows that ended by themselves; whoever records them takes them out."""
