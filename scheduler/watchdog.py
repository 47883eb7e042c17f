"""When a process counts as hung and when it has died too often. Pure policy: knows no process, no pipe, no clock.

An engine is hung after too long a silence (no heartbeat), or after too long a stall (heartbeats, but nothing moves).
Both limits depend on the phase. While loading and compiling a thread of the engine sends the heartbeats, so silence
means a frozen process, and a stall is a stage without progress: hours for a large download. While stepping the engine
loop sends them itself, so silence means a step that never ends, and a stall is work queued and no step finished.
"""

from collections import deque
from dataclasses import dataclass, field

from ropeway.scheduler.messages import Heartbeat, Phase


@dataclass(slots=True, frozen=True)
class PhaseLimit:
    """Seconds."""

    silence: float
    stall: float


@dataclass(slots=True, frozen=True)
class Limits:
    """How patient the supervisor is. The limit of the stepping phase comes with `EngineReady` (`step_timeout`)."""

    loading: PhaseLimit = PhaseLimit(silence=120, stall=3600)
    compiling: PhaseLimit = PhaseLimit(silence=600, stall=3600)
    engine_restarts: int = 3
    worker_restarts: int = 5
    """Per worker."""
    window: float = 600
    """Seconds in which so many restarts are allowed."""
    stack_dump: float = 0.5
    """Seconds a hung process gets to print its stacks before SIGKILL."""


@dataclass(slots=True)
class RestartBudget:
    """At most `restarts` within any `window` seconds."""

    restarts: int
    window: float
    _spent: deque[float] = field(default_factory=deque)

    def spend(self, now: float) -> bool:
        """Whether one more restart is allowed; counts it."""
        while self._spent and self._spent[0] <= now - self.window:
            self._spent.popleft()
        self._spent.append(now)
        return len(self._spent) <= self.restarts


class Watchdog:
    """Watches the heartbeats of one engine process. Times in `time.monotonic()` seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._stepping = limits.loading
        self._last = Heartbeat(generation=0, phase="loading")
        self._heard = now
        self._moved = now

    @property
    def phase(self) -> Phase:
        """Of the last heartbeat."""
        return self._last.phase

    def ready(self, step_timeout: float) -> None:
        """The engine told its limit of the stepping phase (seconds)."""
        self._stepping = PhaseLimit(silence=step_timeout, stall=step_timeout)

    def heard(self, beat: Heartbeat, now: float) -> None:
        """Takes one heartbeat."""
        last, self._last = self._last, beat
        self._heard = now
        idle = beat.phase == "stepping" and not beat.running + beat.waiting
        moved = (beat.phase, beat.stage, beat.progress, beat.steps) != (
            last.phase,
            last.stage,
            last.progress,
            last.steps,
        )
        if idle or moved:
            self._moved = now

    def complaint(self, now: float) -> str | None:
        """Why the engine counts as hung, for people; None if it does not."""
        phase = self._last.phase
        limit = {"loading": self._limits.loading, "compiling": self._limits.compiling}.get(phase, self._stepping)
        if now - self._heard > limit.silence:
            return f"no heartbeat for {now - self._heard:.0f} s while {phase}"
        if now - self._moved > limit.stall:
            return f"no progress for {now - self._moved:.0f} s while {phase}"
        return None
