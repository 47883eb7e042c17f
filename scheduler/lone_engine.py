"""LoneEngine: one engine process and its client, for a program that has no server. asyncio; no text, no HTTP.

What the supervisor is to a server, as far as one child needs it: it passes the engine's reports on to the client, ends
an engine that hangs, and tells the client when it is dead. It starts no second one: the program decides.
"""

import asyncio
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from types import ModuleType

from ropeway.scheduler import engine_process
from ropeway.scheduler.client import EngineClient
from ropeway.scheduler.config import EngineConfig
from ropeway.scheduler.messages import EngineLost, EngineReady, EngineStarting, Heartbeat, LoadFailed, Stop
from ropeway.scheduler.processes import Child, EngineContext, WorkerContext, receive_control, send_control
from ropeway.scheduler.supervisor import GRACE, TICK, make_private_directory
from ropeway.scheduler.watchdog import Limits, Watchdog

GENERATION, WORKER = 1, 0


def metrics_dir(directory: str) -> str:
    """Of the engine whose private directory this is."""
    return f"{directory}/metrics"


def engine_main(context: EngineContext, main: Callable[[EngineContext], None] = engine_process.main) -> None:
    """The engine process around its `main`. Its metrics have a folder of their own, not the program's."""
    metrics = metrics_dir(context.directory)
    os.mkdir(metrics)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
    main(context)


class LoneEngine:
    """Start it in a running loop; the thread of that loop must live as long as the engine shall.

    Args:
        config: what the engine is started with.
        limits: how patient to be with a hung engine.
        main: main function of the engine process; picklable.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: Limits | None = None,
        main: Callable[[EngineContext], None] = engine_main,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits or Limits()
        self._watchdog = Watchdog(self._limits, time.monotonic())
        self._last_words = ""
        self._private = make_private_directory()
        self._directory = self._private.path
        self.metrics_dir = metrics_dir(self._directory)
        """Where the engine's metrics are, for `prometheus_client.multiprocess`; gone after `close`."""
        self._to_client, control = multiprocessing.get_context("spawn").Pipe(duplex=True)
        nobody = socket.socket()
        nobody.close()  # a worker without a listener: no client connects
        self.client = EngineClient(WorkerContext(WORKER, nobody, self._directory, control, None))
        """Submits requests; use it from this loop alone."""
        send_control(self._to_client, EngineStarting(GENERATION))
        self._child: Child | None = _spawn(config, self._directory, main)
        self._loop.add_reader(self._child.sentinel, self._on_death)
        self._loop.add_reader(self._child.control.fileno(), self._hear)
        self._tick = self._loop.call_later(TICK, self._watch)

    async def close(self) -> None:
        """Ends the engine and every unfinished stream; nothing is left of either. Idempotent."""
        self._tick.cancel()
        await self.client.close()
        if self._child:
            self._unwatch(self._child)
            send_control(self._child.control, Stop())
            self._child.wait(GRACE)
            self._child.kill()
            self._child.close()
            self._child = None
        self._to_client.close()
        self._private.remove()

    def _unwatch(self, child: Child) -> None:
        self._loop.remove_reader(child.sentinel)
        self._loop.remove_reader(child.control.fileno())

    def _hear(self) -> None:
        assert self._child
        try:
            while (report := receive_control(self._child.control)) is not None:
                match report:
                    case Heartbeat():
                        self._watchdog.heard(report, time.monotonic())
                        send_control(self._to_client, report)
                    case EngineReady():
                        self._watchdog.ready(report.info.step_timeout)
                    case LoadFailed():
                        self._last_words = report.message
        except EOFError:  # its sentinel tells
            self._loop.remove_reader(self._child.control.fileno())

    def _watch(self) -> None:
        """A hung engine is killed; its sentinel tells then."""
        if self._child and (complaint := self._watchdog.complaint(time.monotonic())):
            self._last_words = f"The engine hung ({complaint}) and was killed."
            self._child.kill(self._limits.stack_dump)
        self._tick = self._loop.call_later(TICK, self._watch)

    def _on_death(self) -> None:
        assert self._child
        self._hear()
        self._unwatch(self._child)
        self._child.wait(GRACE)
        how = self._child.close()
        self._child = None
        send_control(self._to_client, EngineLost(self._last_words or f"The engine process {how}."))


def _spawn(config: EngineConfig, directory: str, main: Callable[[EngineContext], None]) -> Child:
    """The engine's process, without the program's own script.

    multiprocessing lets a spawned process import the script that started it, for functions of that script. We need
    none, and a script that is not guarded by `if __name__ == "__main__"` would start engines without end.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        return Child(
            "ropeway-engine",
            main,
            lambda control: EngineContext(config, GENERATION, directory, control, (WORKER,)),
        )
    finally:
        sys.modules["__main__"] = script
