"""Main functions of spawned test children: they must live in a module that a child can import by name."""

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

from fake_server import load

from ropeway.scheduler.engine_loop import EngineLoop
from ropeway.scheduler.engine_process import serve
from ropeway.scheduler.messages import Stop, WorkerGone, WorkerStarted
from ropeway.scheduler.processes import Control, EngineContext, receive_control, send_control


def echo(control: Connection) -> None:
    """Says its pid, then repeats what it hears until Stop."""
    send_control(control, WorkerStarted(os.getpid()))
    while not isinstance(message := wait_control(control), Stop):
        send_control(control, message)


def ignored_signals(control: Connection) -> None:
    """Tells how many of SIGINT, SIGTERM and SIGHUP it ignores."""
    ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    send_control(control, WorkerGone(sum(ignored)))


def sleeper(control: Connection) -> None:
    """Hears nothing."""
    send_control(control, WorkerStarted(os.getpid()))
    while True:
        time.sleep(60)


def failing_engine(context: EngineContext) -> None:
    """An engine whose first step fails, in a process that would take a minute to tidy up."""
    threading.Thread(target=time.sleep, args=(60,)).start()

    def fail(loop: EngineLoop) -> None:
        raise ZeroDivisionError("in a step")

    EngineLoop.run = fail  # type: ignore[method-assign]
    serve(context, load)


def wait_control(control: Connection) -> Control:
    """The next message."""
    assert control.poll(60)
    message = receive_control(control)
    assert message is not None
    return message
