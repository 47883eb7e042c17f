"""Heads of requests on a raw socket: too large, too slow, no HTTP at all. And bodies written beside `send`."""

import http.client
import json
import socket
import time
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from shell import exchange, serving
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ropeway.server.http_protocol import BODY_WRITER, MAX_HEAD_BYTES, MAX_HEADERS, LimitedHttpProtocol

OK = b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class WrittenResponse(Response):
    """Begins and ends with `send`, writes between until the socket is full, and once more when it is not."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = scope["extensions"][BODY_WRITER]
        assert not writer.ready, "nothing was begun"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writes = 0
        while writer.ready:
            writer.write(b"a" * 10_000)
            writes += 1
            assert writes < 10_000, "no end to what a reader who does not read may cost"
        await send({"type": "http.response.body", "body": b"b" * 7, "more_body": True})
        assert writer.ready
        writer.write(b"c" * 3)
        await send({"type": "http.response.body", "body": b"%d" % writes, "more_body": False})
        assert not writer.ready


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(LimitedHttpProtocol, "head_seconds", 0.8)
    app = FastAPI(openapi_url=None)

    @app.get("/ok")
    async def ok() -> dict[str, str]:
        return {"ok": "yes"}

    @app.post("/ok")
    async def post() -> dict[str, str]:
        return {"ok": "yes"}

    @app.get("/slow")
    async def slow() -> StreamingResponse:
        async def pieces():  # type: ignore[no-untyped-def]
            import asyncio

            for _ in range(10):
                await asyncio.sleep(0.2)
                yield b"piece"

        return StreamingResponse(pieces())

    @app.get("/written")
    async def written() -> Response:
        return WrittenResponse()

    with serving(app) as address:
        yield address


def check(answer: bytes, status: int, code: str) -> None:
    """One refused request: status, shape, id, closed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"x-request-id: " in head and b"connection: close" in head
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize(
    "head",
    [
        b"GET /ok HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /ok HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET /ok HTTP/1.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nX: " + b"y" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_large_heads(address: tuple[str, int], head: bytes) -> None:
    """Guards memory: uvicorn's parser has no limit of its own for any of these."""
    check(exchange(address, head), 431, "headers_too_large")
    assert exchange(address, LAST).startswith(b"HTTP/1.1 200")


def test_a_header_that_never_ends(address: tuple[str, int]) -> None:
    """Guards memory: a header without an end never reaches a callback, only its bytes can be counted."""
    check(exchange(address, b"GET /ok HTTP/1.1\r\nX: ", *[b"y" * 16_384] * 6), 431, "headers_too_large")


def test_a_head_that_stops(address: tuple[str, int]) -> None:
    """Guards sockets: a head that stops half-way is ended by a deadline, on a fresh and on a used connection."""
    for first in (b"", OK):
        answer = exchange(address, first + b"GET /ok HTTP/1.1\r\nHost: x\r\nX-Half")
        check(answer[answer.rindex(b"HTTP/1.1") :], 408, "request_timeout")
    check(exchange(address, b""), 408, "request_timeout")


@pytest.mark.parametrize(
    "bad",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /ok HTTP/1.1\r\nHost x\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /ok HTTP/1.1\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n",
    ],
)
def test_no_http(address: tuple[str, int], bad: bytes) -> None:
    """Guards proxies against request smuggling: an ambiguous length or host is refused, in the one error shape."""
    answer = exchange(address, bad)
    check(answer[answer.rindex(b"HTTP/1.1") :], 400, "bad_request")


def test_old_clients_get_no_chunks(address: tuple[str, int]) -> None:
    """Guards HTTP/1.0, which proxies still speak: a stream's body is the bytes themselves, to the connection's end; it
    needs no Host."""
    head, _, body = exchange(address, b"GET /slow HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"connection: close" in head
    assert b"transfer-encoding" not in head.lower() and body == b"piece" * 10
    head, _, body = exchange(address, b"GET /ok HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"content-length: 12" in head and body == b'{"ok":"yes"}'
    assert b"transfer-encoding: chunked" in exchange(address, b"GET /slow" + LAST.removeprefix(b"GET /ok"))


def test_many_requests_share_a_connection(address: tuple[str, int]) -> None:
    """Guards keep-alive: the limits count per request, not per connection, and body bytes are no head."""
    padded = b"GET /ok HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n"
    assert exchange(address, *[padded] * 6, LAST).count(b"HTTP/1.1 200") == 7
    post = b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"y" * 100_000
    assert exchange(address, post + LAST).count(b"HTTP/1.1 200") == 2


def test_a_late_head_does_not_cut_the_answer_before_it(address: tuple[str, int]) -> None:
    """Guards streams: bytes pipelined behind a request never put an error into the middle of its answer."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET /ok HTTP/1.1\r\nX-Half")
        answer, begin = b"", time.monotonic()
        while b"HTTP/1.1 408" not in answer and time.monotonic() - begin < 20:
            answer += connection.recv(65536)
    first, _, second = answer.partition(b"HTTP/1.1 408")
    assert first.count(b"piece") == 10 and first.endswith(b"0\r\n\r\n") and b"request_timeout" in second


def test_what_is_written_beside_send_is_part_of_the_body(address: tuple[str, int]) -> None:
    """Guards framing and order of the two ways to write, and that a full socket is known."""
    client = http.client.HTTPConnection(*address, timeout=20)
    client.request("GET", "/written")
    time.sleep(0.3)  # reads nothing yet: the server's buffers fill
    body = client.getresponse().read()
    writes = int(body.rpartition(b"ccc")[2])
    assert body == b"a" * 10_000 * writes + b"b" * 7 + b"ccc%d" % writes
    client.request("GET", "/ok")  # on the same connection
    assert client.getresponse().read() == b'{"ok":"yes"}'
    client.close()
