"""Main of an API worker process: uvicorn on the inherited socket. Knows the order of birth and death, no route.

supervisor    spawn                                Drain(deadline)
worker        health answers ... engine ready, tokenizer loaded ... 503 to new, streams finish ... exit 0
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterator

import uvicorn
import uvloop
from fastapi import FastAPI

from ropeway.scheduler.client import EngineClient, EngineFailed
from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.scheduler.processes import WorkerContext
from ropeway.server.admission import Admission
from ropeway.server.app import create_app
from ropeway.server.http_protocol import LimitedHttpProtocol
from ropeway.server.keys import KeyRing
from ropeway.server.metrics import RequestMetrics, watch_loop
from ropeway.server.services import Services

KEEP_ALIVE_S = 75
"""Longer than the idle time after which common balancers close theirs, so that they close first."""
LAST_WORDS_S = 1
"""What streams get, once cut off, to write their error event."""
DRAIN_TICK_S = 0.05


def main(context: WorkerContext) -> None:
    """Serves until the supervisor says Drain. `context.settings` is a `Settings`."""
    set_up_logging(context.settings.log_level)
    uvloop.run(serve(context))


def set_up_logging(level: str) -> None:
    """Everything to stderr; an access line is JSON as it is."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    access = logging.getLogger("ropeway.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.propagate = False
    for chatty in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


async def serve(context: WorkerContext) -> None:
    """The whole life of a worker."""
    settings = context.settings
    client = EngineClient(context)
    await client.start()
    metrics = RequestMetrics(settings.served_names[0])
    admission = Admission(settings.max_queued_requests, settings.max_queued_tokens, metrics.rejected)
    services = Services(settings=settings, client=client, admission=admission, metrics=metrics)
    server = make_server(create_app(services, KeyRing.load(settings)))
    process = ProcessMetrics(f"worker-{context.worker}")
    watching = asyncio.create_task(watch_loop(metrics, process, lambda: services.why_unready() is None))
    loading = asyncio.create_task(load(services))
    serving = asyncio.create_task(server.serve(sockets=[context.listener]))
    draining = asyncio.create_task(drain(services))
    await asyncio.wait({serving, draining}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    await client.close()
    for task in (watching, loading, draining):
        task.cancel()


class Server(uvicorn.Server):
    """uvicorn's, with signals left to the supervisor."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def make_server(app: FastAPI) -> Server:
    """The server with our limits."""
    config = uvicorn.Config(
        app,
        http=LimitedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    return Server(config)


async def load(services: Services) -> None:
    """Waits for the engine, then loads what the routes need. An engine that never comes ends the server elsewhere."""
    with contextlib.suppress(EngineFailed):
        await services.load(await services.client.wait_ready())


async def drain(services: Services) -> None:
    """Returns when the worker may go: nothing runs any more, or the deadline came and the rest was cut off."""
    deadline = await services.client.wait_drain()
    while services.admission.requests and time.monotonic() < deadline:
        await asyncio.sleep(DRAIN_TICK_S)
    await services.client.close()
