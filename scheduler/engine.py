"""Engine: the loop that never stops. Plan a step, launch it, read one, tell its rows.

With lag 0 the step just launched is read at once. With lag 1 the step before is read while the new one computes, so the
host's work hides behind the device's. Nothing else in this file, or above it, depends on the lag.

Knows no tensors (the runner does), no processes and no sockets. One thread calls everything.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, Protocol

from ropeway.kernels.step import StepInput, StepOutput
from ropeway.scheduler.messages import AbortRequest, AddRequest, RowOutput
from ropeway.scheduler.plan import StepPlan
from ropeway.scheduler.row import InvalidRequest
from ropeway.scheduler.scheduler import Scheduler


class Flight(Protocol):
    """A launched step."""

    def read(self) -> StepOutput:
        """Waits until the step is computed. Called once, in launch order."""
        ...


class Runner(Protocol):
    """What computes steps: `kernels.runner.ModelRunner`, or a fake."""

    def launch(self, step: StepInput) -> Flight:
        """Starts a step after all those launched before it. Takes what it needs from `step` before it returns."""
        ...

    def idle_work(self) -> bool:
        """Does a piece of work that makes later steps faster, a fraction of a second; False if none is left."""
        ...


@dataclass(slots=True)
class StepStats:
    """Counts over all finished steps, for metrics. What the scheduler counts is in `Scheduler.stats`."""

    steps: int = 0
    real_slots: int = 0
    """Tokens that were computed because a row wanted them."""
    computed_slots: int = 0
    """Token places that were computed, pads included: padding ratio = 1 - real / computed."""
    last_step_seconds: float = 0.0
    """Wall time of the last `step` call that read a step."""
    last_rows: int = 0
    """Rows of the last step."""
    last_decode_rows: int = 0
    """Those of them that computed a single token on top of a cache."""
    last_host_gap_seconds: float = 0.0
    """How long the device had nothing to do before the last step."""


class Engine:
    """One scheduler, one runner, and the steps between them that are launched but not read."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, lag: Literal[0, 1], clock: Callable[[], float] = perf_counter
    ) -> None:
        """`clock` measures steps, in seconds."""
        self._clock = clock
        self.scheduler = scheduler
        self.runner = runner
        self.lag = lag
        self.stats = StepStats()
        self._unread: deque[tuple[StepPlan, Flight, float]] = deque()
        self._last_end = 0.0
        """When the last step was read."""

    def add(self, owner: int, request: AddRequest) -> None:
        """Queues a request of API worker `owner`. One that cannot be run is refused by the next step."""
        try:
            self.scheduler.add(owner, request)
        except InvalidRequest as error:
            self.scheduler.refuse(owner, request, error)

    def abort(self, owner: int, request: AbortRequest) -> None:
        """Drops a request or one of its choices; nothing is sent for it any more."""
        self.scheduler.abort(owner, request.request_id, request.choice)

    def abort_owner(self, owner: int) -> None:
        """Drops everything that a worker, now dead, had asked for."""
        self.scheduler.abort_owner(owner)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything. If not, nothing happens until the next `add`."""
        return bool(self._unread or self.scheduler.num_unfinished or self.scheduler.has_outputs)

    def step(self, now: float) -> dict[int, list[RowOutput]]:
        """Launches the next step, reads one, and returns what its rows got: owner -> outputs.

        Args:
            now: `time.monotonic()`, for deadlines and the times of rows.
        """
        begin = self._clock()
        plan = self.scheduler.plan(now)
        if plan is not None:
            launched = self._clock()
            self._unread.append((plan, self.runner.launch(plan.step), launched))
        # With nothing new to hide behind, what is unread is read.
        while len(self._unread) > (self.lag if plan is not None else 0):
            self._read(begin, now)
        return self.scheduler.take_outputs()

    def _read(self, begin: float, now: float) -> None:
        plan, flight, launched = self._unread.popleft()
        output = flight.read()
        end = self._clock()
        # Steps compute one after the other: it began when it was launched, or when the one before it was done. But a
        # host that compiles a kernel comes too late to see either end, so the device's own clock comes first.
        seconds = output.seconds or end - max(launched, self._last_end)
        self._last_end = end
        self.scheduler.pace.observe(plan.decode_rows, plan.num_tokens - plan.decode_rows, seconds)
        self.scheduler.update(plan, output, now + end - begin)
        self.stats.steps += 1
        self.stats.real_slots += plan.num_tokens
        self.stats.computed_slots += output.computed_slots
        self.stats.last_step_seconds = self._clock() - begin
        self.stats.last_rows = len(plan.rows)
        self.stats.last_decode_rows = plan.decode_rows
        self.stats.last_host_gap_seconds = output.host_gap_seconds
