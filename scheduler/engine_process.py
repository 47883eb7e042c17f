"""Main of the engine process: loads the model, runs the engine's loop, talks to workers and supervisor.

    loading    a thread sends heartbeats; build the runner, export the text files
    stepping   the loop itself: inbox -> engine.step -> one message per worker; idle, it sleeps in poll

Nothing heavy is imported before the first heartbeat is out. An exception in a step ends the process: the supervisor
starts another, and the workers send their unfinished requests again.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec
import zmq

from ropeway.kernels.step import StepInput, StepOutput
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.config import EngineConfig
from ropeway.scheduler.engine import Engine, Flight, Runner
from ropeway.scheduler.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    FromEngine,
    Heartbeat,
    LoadFailed,
    ModelInfo,
    Phase,
    StepOutputs,
    Stop,
    ToEngine,
    WorkerGone,
    WorkerStarted,
    WorkerStuck,
)
from ropeway.scheduler.processes import EngineContext, receive_control, send_control, socket_address
from ropeway.scheduler.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from ropeway.scheduler.engine_metrics import EngineMetrics, StepKind

logger = logging.getLogger("ropeway.engine")

HEARTBEAT_SECONDS = 0.25
QUEUED_MESSAGES = 1000
"""Steps a worker may lag behind before it is given up."""

Progress = Callable[[Phase, str, float], None]
"""progress(phase, stage for people, share of the whole start done)."""


class LoadError(Exception):
    """The model cannot be served; the message is one sentence that says what to do."""


@dataclass(slots=True, frozen=True)
class Loaded:
    """A model that is ready to step."""

    runner: Runner
    info: ModelInfo
    lag: Literal[0, 1]


Load = Callable[[EngineConfig, str, Progress], Loaded]
"""load(config, text_dir, progress): text_dir is a folder to be made. Raises LoadError."""


def main(context: EngineContext) -> None:
    """The engine process."""
    serve(context, load_model)


def load_model(config: EngineConfig, text_dir: str, progress: Progress) -> Loaded:
    """Model, memory plan and warm-up from `kernels`, text files for the API workers."""
    raise NotImplementedError


def serve(context: EngineContext, load: Load) -> None:
    """Loads and loops until the supervisor says stop or is gone. Exits with 1 if the model cannot be loaded."""
    pulse = Pulse(context)
    try:
        loaded = load(context.config, f"{context.directory}/text{context.generation}", pulse.progress)
    except LoadError as error:
        pulse.stop()
        send_control(context.control, LoadFailed(context.generation, str(error)))
        sys.exit(1)
    pulse.stop()
    EngineLoop(context, loaded).run()


class Pulse:
    """The heartbeat while loading and compiling: a thread, since a long load is no hang."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._beat = Heartbeat(context.generation, "loading")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def progress(self, phase: Phase, stage: str, done: float) -> None:
        """The next heartbeat says so."""
        self._beat = Heartbeat(self._context.generation, phase, stage, done)

    def stop(self) -> None:
        """No heartbeat comes after it; the control pipe is the caller's alone."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            send_control(self._context.control, self._beat)
            if self._stop.wait(HEARTBEAT_SECONDS):
                return
