"""Answers that take long, as raw ASGI: an event stream or one JSON document. Both notice when the client leaves.

Knows bytes, headers and silence; the protocol says what the bytes are. Whatever happens, the generation is closed
when the call returns: its rows are aborted and its place in the queue is given back.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway.server.engine_errors import engine_failure
from ropeway.server.errors import ApiError
from ropeway.server.generator import Generation, Outcome, collect
from ropeway.server.http_protocol import BODY_WRITER, BodyWriter
from ropeway.server.request import ChoiceDelta

KEEP_ALIVE_S = 10.0
"""Silence after which a comment tells proxies and clients that the stream lives."""
SLOW_READER_S = 60.0
"""A client whose socket takes nothing for so long has left."""
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Result = TypeVar("Result")


class Frames(Protocol):
    """How a protocol writes its stream."""

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        """The events for one wake-up; b"" if there is nothing to say yet."""

    def finish(self) -> bytes:
        """The last events: usage, if asked for, and `data: [DONE]`."""


class ClientLeft(Exception):
    """The client closed its connection, or reads no more."""


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8. Line separators beyond ASCII are escaped: clients that split lines as Python does break there."""
    data = msgspec.json.encode(value)
    if data.isascii():
        return data
    for raw, escaped in ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029")):
        data = data.replace(raw, escaped)
    return data


def event(document: Any) -> bytes:
    """One server-sent event with a JSON document."""
    return b"data: " + json_bytes(document) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """How OpenAI's streams end in an error."""
    return event(error.body()) + DONE


class EventStream(Response):
    """`EventStream(generation, frames, headers)`: return it from an endpoint like a response.

    Headers are held until the first token or the first keep-alive; until then an ApiError is raised to the
    application's handler and has its own status, afterwards it is `on_error(error)`, an error event of the protocol.
    """

    def __init__(
        self,
        generation: Generation,
        frames: Frames,
        headers: dict[str, str] | None = None,
        on_error: Callable[[ApiError], bytes] = error_event,
    ) -> None:
        self._on_error = on_error
        self._generation = generation
        self._frames = frames
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS | (headers or {}))
        self._started = False
        self._ended = False
        self._spoke = time.monotonic()
        self._turn = asyncio.Lock()  # tokens and keep-alives are written by two tasks
        self._stuck = False
        """The socket took nothing for `SLOW_READER_S`: whoever has waited for a turn meanwhile has waited enough."""
        self._writer: BodyWriter | None = None
        self._parked: asyncio.Future[None] | None = None
        """Done when `_flow` shall end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request. Raises: ApiError, if nothing was sent yet."""
        outcome: Outcome | None = "error"
        self._writer = scope.get("extensions", {}).get(BODY_WRITER)
        try:
            await while_connected(self._speak(send), receive)
            outcome = None
        except ClientLeft:  # a server may say so the moment the last bytes are out: that is no leaving
            outcome = None if self._ended else "disconnected"
        finally:
            self._generation.close(outcome)

    async def _speak(self, send: Send) -> None:
        beat = asyncio.create_task(self._keep_alive(send))
        try:
            async for deltas in self._generation:
                if data := self._frames.encode(deltas):
                    await self._write(send, data)
                    await self._flow()
            await self._write(send, self._frames.finish(), last=True)
        except ApiError as error:
            if not self._started:
                raise
            await self._write(send, self._on_error(error), last=True)
        except ClientLeft:  # nobody is there to read an error event
            raise
        except Exception:
            if self._started:
                failure = engine_failure("The server failed on this request.")
                await self._write(send, self._on_error(failure), last=True)
            raise
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)

    async def _flow(self) -> None:
        """As long as nothing is in the way, tokens are written by the very callback that hears the engine: no task
        wakes up for them. What that leaves, the loop above takes: an end, a failure, a socket that is full."""
        if self._writer is None:
            return
        self._parked = parked = asyncio.get_running_loop().create_future()
        self._generation.listen(self._pass_on)
        try:
            self._pass_on()
            await parked
        finally:
            self._generation.listen(None)

    def _pass_on(self) -> None:
        """Writes what there is; ends `_flow` if it cannot go on."""
        if self._writer is None or self._parked is None or self._parked.done():
            return
        try:
            if self._writer.ready and not self._turn.locked():
                deltas = self._generation.take()
                if deltas and (data := self._frames.encode(deltas)):
                    self._writer.write(data)
                    self._spoke = time.monotonic()
                if not self._generation.over:
                    return
            self._parked.set_result(None)
        except Exception as error:  # a bug of ours belongs to its own request
            self._parked.set_exception(error)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._spoke + KEEP_ALIVE_S - time.monotonic())
            if time.monotonic() - self._spoke >= KEEP_ALIVE_S:
                await self._write(send, KEEP_ALIVE)

    async def _write(self, send: Send, data: bytes, last: bool = False) -> None:
        """Sends the headers before the first bytes. Raises: ClientLeft if the socket takes nothing for long."""
        async with self._turn:
            if self._stuck:
                raise ClientLeft
            try:
                async with asyncio.timeout(SLOW_READER_S):
                    if not self._started:
                        self._started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": data, "more_body": not last})
                    self._ended = last
            except TimeoutError:
                self._stuck = True
                if self._parked is not None and not self._parked.done():
                    self._parked.set_result(None)
                raise ClientLeft from None
            self._spoke = time.monotonic()


class JsonAnswer(Response):
    """`JsonAnswer(generation, body, headers)`: `body(choices)` makes the document once every choice has ended."""

    def __init__(
        self,
        generation: Generation,
        body: Callable[[list[ChoiceDelta]], Any],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._generation = generation
        self._body = body
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "application/json"} | (headers or {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request, unless the client leaves before. Raises: ApiError, nothing was sent then."""
        outcome: Outcome | None = "error"
        try:
            choices = await while_connected(collect(self._generation), receive)
            data = json_bytes(self._body(choices))
            raw = [*self.raw_headers, (b"content-length", b"%d" % len(data))]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": data, "more_body": False})
            outcome = None
        except ClientLeft:
            outcome = "disconnected"
        finally:
            self._generation.close(outcome)


async def while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises: ClientLeft; whatever `work` raises.

    The request's body must have been read: the next message is the client's leaving.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
