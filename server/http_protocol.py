"""uvicorn's httptools protocol with the limits it lacks: header bytes, header count, and a deadline for both.

Knows bytes on a socket only. llhttp bounds nothing by itself, and uvicorn waits for ever for a head that stops
half-way. Whatever is refused here never reached the application, so the error shape and the request id are made here.
"""

import asyncio
import json
import uuid
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ropeway.server.errors import ApiError

MAX_HEAD_BYTES = 64 * 2**10
MAX_HEADERS = 200
HEAD_SECONDS = 20.0
BODY_WRITER = "ropeway.body_writer"
"""Key of the request's `BodyWriter` among the scope's extensions."""


class _HeadTooLarge(Exception):
    """Stops the parser."""


class BodyWriter:
    """Writes parts of a body that was begun with ASGI's `send`, for who is called back and cannot wait.

    `send` costs a chain of coroutines through every middleware; a stream of tokens pays that thousands of times. The
    first and the last part of a body go through `send`.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        """Whether `write` may be called now; not while the socket's buffer is full, which `send` waits for."""
        cycle = self._cycle
        return bool(
            cycle.response_started
            and cycle.chunked_encoding
            and not cycle.flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def write(self, data: bytes) -> None:
        """One chunk, not empty (RFC 9112, section 7.1)."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class _BadHead(Exception):
    """Stops the parser."""


class _PlainSend:
    """ASGI's `send` for HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._counted = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._counted = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._counted:
                self._cycle.chunked_encoding = False
        elif not self._counted:  # uvicorn compares with the length that was announced
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large, 408 to one that does not end, 400 to one that is no HTTP.

    HTTP/1.1 without exactly one Host is none (RFC 9112, section 3.2).
    """

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._received = 0
        """Bytes since the head began, in whole reads: an endless header never reaches a callback."""
        self._parsed = 0
        """Bytes of the request line and of whole headers: a read may hold all of them at once."""
        self._too_large = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection owes us a head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is owed any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, then counts what a head that is still open has cost."""
        began_in_head = self._in_head
        super().data_received(data)
        if began_in_head and self._in_head:
            self._received += len(data)
            if self._received > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, "The request's headers are too large.", "headers_too_large")

    def on_message_begin(self) -> None:
        """The first bytes of a head."""
        super().on_message_begin()
        self._parsed = 0
        if not self._in_head:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole header."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """The head is whole; the body's deadline is the application's."""
        self._in_head = False
        self._stop_timer()
        version = self.parser.get_http_version()
        if version == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            raise _BadHead
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # its task has not begun to run
            if version == "1.0":
                self.cycle.send = _PlainSend(self.cycle)  # type: ignore[method-assign]
            self.scope["extensions"] = {BODY_WRITER: BodyWriter(self.cycle)}  # type: ignore[dict-item]

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser stopped."""
        if self._too_large:
            self._refuse(431, "The request's headers are too large.", "headers_too_large")
        else:
            self._refuse(400, "This is not a valid HTTP request.", "bad_request")

    def _count(self, size: int) -> None:
        self._parsed += size
        if self._parsed > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._too_large = True
            raise _HeadTooLarge

    def _expect_head(self) -> None:
        self._in_head = True
        self._received = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._answering():  # a pipelined head may wait as long as the answer before it
            self._expect_head()
        else:
            self._refuse(408, f"The request was not complete after {self.head_seconds:g} s.", "request_timeout")

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answers and closes; closes only, where bytes of an earlier answer are still under way."""
        if not self._answering():
            body = json.dumps(ApiError(status, message, code=code).body()).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
