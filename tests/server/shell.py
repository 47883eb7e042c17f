"""What tests of the API worker's shell stand on: services without an engine, and a real server in a thread."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
from fake_client import FakeClient, model_info
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from ropeway.scheduler.client import EngineClient
from ropeway.server.admission import Admission
from ropeway.server.metrics import RequestMetrics
from ropeway.server.services import Services
from ropeway.server.settings import Settings
from ropeway.server.worker import make_server


def make_services(text_dir: Path | None = None, reason: str = "", **settings: Any) -> Services:
    """Services over a fake client; loaded if there is a text_dir."""
    client = FakeClient(model_info(text_dir) if text_dir else None, reason)
    metrics = RequestMetrics("tiny", CollectorRegistry())
    services = Services(
        settings=Settings(**({"served_model_name": ("tiny", "org/tiny")} | settings)),
        client=cast(EngineClient, client),
        admission=Admission(8, 1000, metrics.rejected),
        metrics=metrics,
    )
    if client.info is not None:
        asyncio.run(services.load(client.info))
    return services


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[tuple[str, int]]:
    """The app behind our uvicorn on a free port, in a thread: (host, port)."""
    server = make_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def exchange(address: tuple[str, int], *parts: bytes, pause: float = 0.0) -> bytes:
    """Sends raw bytes, reads until the server closes: the last request must make it do so."""
    with socket.create_connection(address, timeout=20) as connection:
        for part in parts:
            with contextlib.suppress(OSError):  # the server may have closed: its answer is read all the same
                connection.sendall(part)
            time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def client(app: FastAPI) -> httpx.AsyncClient:
    """httpx straight on the ASGI app."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


def check_error(response: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    """The one error shape; returns its inner object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert isinstance(error["message"], str) and error["message"]
    return dict(error)
