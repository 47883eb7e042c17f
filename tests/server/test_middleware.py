"""Request ids, the access log, the last exception handler and body limits, on the wire where the wire matters."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from shell import check_error, client, exchange, serving
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ropeway.server.admission import Admission
from ropeway.server.metrics import RequestMetrics
from ropeway.server.middleware import MAX_COMMAS, BodyLimit, Envelope
from ropeway.server.request import ChoiceDelta

LIMIT = 1000


@pytest.fixture
def metrics() -> RequestMetrics:
    return RequestMetrics("tiny", CollectorRegistry())


@pytest.fixture
def app(metrics: RequestMetrics) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body(), media_type="application/json")

    @app.get("/boom/{what}")
    async def boom(what: str) -> None:
        raise RuntimeError("a secret of ours")

    @app.get("/broken-stream")
    async def broken() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("a secret of ours")

        return StreamingResponse(pieces())

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        record = metrics.begin(request.scope, 2, Admission(8, 100).reserve(2))
        record.settle(7)
        record.observe(ChoiceDelta(0, text="a secret", token_ids=[1, 2], finish_reason="length"))
        record.finish()
        return {}

    app.add_middleware(BodyLimit, max_bytes=LIMIT, seconds=1.0)
    app.add_middleware(Envelope, metrics=metrics)
    return app


@pytest.fixture
def address(app: FastAPI) -> Iterator[tuple[str, int]]:
    with serving(app) as address:
        yield address


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """Access entries, in order."""
    entries: list[dict[str, Any]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entries.append(json.loads(record.getMessage()))

    logger, handler = logging.getLogger("ropeway.access"), Collect()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield entries
    logger.removeHandler(handler)


async def test_request_id_of_the_caller(app: FastAPI) -> None:
    """Guards tracing: a well-formed id comes back; one that could break a log or a header is replaced."""
    async with client(app) as http:
        good = await http.get("/nowhere", headers={"x-request-id": "trace-1.a_B"})
        assert good.headers["x-request-id"] == "trace-1.a_B"
        for bad in ("a b", "x" * 129, "", "a\tb", "\x1b[31m", "ä".encode("latin-1")):
            answer = await http.get("/nowhere", headers={"x-request-id": bad})
            assert len(answer.headers["x-request-id"]) == 32
        first, second = await http.get("/nowhere"), await http.get("/nowhere")
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_unexpected_exceptions_stay_inside(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """Guards secrets: the client gets a 500 without our text, the log gets the traceback under the same id."""
    async with client(app) as http:
        answer = await http.get("/boom/x")
    error = check_error(answer, 500, "engine_error")
    assert "secret" not in answer.text and error["type"] == "server_error"
    assert answer.headers["x-should-retry"] == "false"
    assert "a secret of ours" in caplog.text and answer.headers["x-request-id"] in caplog.text


def test_broken_stream_is_cut(address: tuple[str, int]) -> None:
    """Guards clients: a stream that breaks ends without its final chunk, so that it cannot be taken for whole."""
    answer = exchange(address, b"GET /broken-stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"half" in answer and b"0\r\n\r\n" not in answer and b"secret" not in answer


async def test_access_log(app: FastAPI, access_log: list[dict[str, Any]]) -> None:
    """Guards operations: one JSON line per request with tokens and outcome, templates for paths, never text."""
    async with client(app) as http:
        await http.post("/generate", json={"prompt": "a secret"}, headers={"x-request-id": "r1"})
        await http.get("/boom/secret-path")
        await http.get("/secret-path")
    generated, failed, unknown = access_log
    assert (
        generated.items()
        >= {
            "request_id": "r1",
            "route": "/generate",
            "status": 200,
            "n": 2,
            "prompt_tokens": 7,
            "output_tokens": 2,
            "outcome": "length",
        }.items()
    )
    assert generated["ttft_ms"] >= 0 and generated["ms"] >= generated["ttft_ms"]
    assert (failed["route"], failed["status"]) == ("/boom/{what}", 500)
    assert (unknown["route"], unknown["status"]) == ("unmatched", 404)
    assert "secret" not in json.dumps(access_log)


async def test_http_metrics(app: FastAPI, metrics: RequestMetrics) -> None:
    """Guards Prometheus against unbounded labels: route templates, never raw paths."""
    async with client(app) as http:
        for name in ("a", "b"):
            await http.get(f"/boom/{name}")
            await http.get(f"/{name}")
    labels = {"model_name": "tiny", "method": "GET"}
    sample = metrics.registry.get_sample_value
    name = "ropeway_http_requests_total"
    assert sample(name, labels | {"route": "/boom/{what}", "status": "500"}) == 2
    assert sample(name, labels | {"route": "unmatched", "status": "404"}) == 2


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Type": ""}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/json", "Content-Length": "1001"}, 413, "request_too_large"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, None),
        ({"Content-Type": "application/vnd.api+json"}, 200, None),
    ],
)
async def test_body_headers(app: FastAPI, headers: dict[str, str], status: int, code: str | None) -> None:
    """Guards the routes: what is no JSON, or too much of it, is refused before anything is read."""
    async with client(app) as http:
        answer = await http.post("/echo", content=b"{}", headers=headers)
    if code:
        check_error(answer, status, code)
    else:
        assert (answer.status_code, answer.content) == (200, b"{}")


def post(*more: str, last: bool = True) -> bytes:
    more = (*more, "Connection: close") if last else more
    lines = ("POST /echo HTTP/1.1", "Host: x", "Content-Type: application/json", *more, "", "")
    return "\r\n".join(lines).encode()


def test_too_large_on_the_wire(address: tuple[str, int]) -> None:
    """Guards memory: 100 kB are refused with a length and in chunks, and the connection can be used again."""
    big = b"x" * 100_000
    answer = exchange(address, post("Content-Length: 100000"), big)
    assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer
    chunks = b"".join(b"3e8\r\n" + big[:1000] + b"\r\n" for _ in range(100)) + b"0\r\n\r\n"
    answer = exchange(address, post("Transfer-Encoding: chunked"), chunks)
    assert answer.startswith(b"HTTP/1.1 413")
    answer = exchange(address, post("Content-Length: 100000", last=False), big + post("Content-Length: 2") + b"{}")
    assert answer.startswith(b"HTTP/1.1 413") and b"HTTP/1.1 200" in answer


class Held:
    """BodyLimit around an app that answers when it is told to."""

    def __init__(self) -> None:
        self.rejected: list[str] = []
        self.go = asyncio.Event()
        self.limit = BodyLimit(self._app, max_held=250_000, on_reject=self.rejected.append)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert len((await receive())["body"]) == scope["size"]
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def post(self, size: int) -> int:
        """Status of a body that comes in pieces of 10 kB."""
        pieces = [10_000] * (size // 10_000) + [0]
        statuses: list[int] = []

        async def receive() -> Message:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * pieces.pop(0), "more_body": bool(pieces)}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                if message["status"] == 503:
                    assert (b"retry-after", b"5") in message["headers"]

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "headers": headers, "state": {}, "size": size}
        await self.limit(scope, receive, send)
        return statuses[0]


async def test_large_bodies_in_flight_are_bounded() -> None:
    """Guards the memory: any number of bodies, each within its limit, was held at once. Small ones still pass, and
    room comes back with the answers."""
    held = Held()
    first = [asyncio.create_task(held.post(100_000)) for _ in range(2)]
    small = [asyncio.create_task(held.post(60_000)) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert held.limit.held == 200_000
    assert await held.post(100_000) == 503
    assert held.rejected == ["bodies"] and held.limit.held == 200_000
    held.go.set()
    assert set(await asyncio.gather(*first, *small)) == {200}
    assert held.limit.held == 0
    assert await held.post(100_000) == 200 and held.limit.held == 0


async def test_too_many_values(app: FastAPI) -> None:
    """Guards the event loop: 32 MB of tiny values kept the parser, and with it everybody, busy for seconds."""
    wide = FastAPI(openapi_url=None, routes=app.routes)
    wide.add_middleware(BodyLimit)
    async with client(wide) as http:
        for body in (b"[" + b"[]," * MAX_COMMAS + b"[],[]]", b'["' + b",a" * (MAX_COMMAS + 1) + b'"]'):
            answer = await http.post("/echo", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        text = b'["' + b"a" * 4_000_000 + b'"]'
        assert (await http.post("/echo", content=text, headers={"content-type": "application/json"})).content == text


def test_tiny_chunks_make_one_body(address: tuple[str, int]) -> None:
    """Guards routes: they see a whole body, however it came."""
    chunks = b"".join(b"1\r\nx\r\n" for _ in range(999)) + b"0\r\n\r\n"
    answer = exchange(address, post("Transfer-Encoding: chunked"), chunks)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"x" * 999)


def test_body_that_stops_or_trickles(address: tuple[str, int]) -> None:
    """Guards sockets: the deadline is absolute, so a byte now and then buys no time."""
    stopped = exchange(address, post("Content-Length: 10"), b"{")
    trickling = exchange(address, post("Content-Length: 100"), *[b" "] * 20, pause=0.1)
    for answer in (stopped, trickling):
        assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
        assert b"onnection: close" in answer


async def test_leaving_while_sending(app: FastAPI, access_log: list[dict[str, Any]]) -> None:
    """Guards the handlers: a client that leaves in mid-body reaches no route and is logged as gone."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/echo", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert access_log[0]["status"] == 499


async def test_disconnect_reaches_the_route(app: FastAPI) -> None:
    """Guards abort on leaving: after the whole body a route still hears that its client has gone."""
    heard = asyncio.Event()

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        assert (await receive())["type"] == "http.disconnect"
        heard.set()

    messages = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    await BodyLimit(endpoint)(scope, receive, send)
    assert heard.is_set()


def test_httpx_against_the_wire(address: tuple[str, int]) -> None:
    """Guards ordinary clients: all of the above stays out of their way."""
    answer = httpx.post(f"http://{address[0]}:{address[1]}/echo", json={"a": 1})
    assert answer.json() == {"a": 1} and answer.headers["x-request-id"]
