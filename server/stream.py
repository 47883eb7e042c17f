"""Answers that take long, as raw ASGI: an event stream or one JSON document. Both notice when the client leaves.

Knows bytes, headers and silence; the protocol says what the bytes are. Whatever happens, the generation is closed
when the call returns: its rows are aborted and its place in the queue is given back.
"""

from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from ropeway.server.generator import Generation
from ropeway.server.request import ChoiceDelta


class Frames(Protocol):
    """How a protocol writes its stream."""

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        """The events for one wake-up; b"" if there is nothing to say yet."""

    def finish(self) -> bytes:
        """The last events: usage, if asked for, and `data: [DONE]`."""


class EventStream:
    """`EventStream(generation, frames, headers)`: return it from an endpoint like a response.

    Headers are held until the first token or the first keep-alive; until then an ApiError is raised to the
    application's handler and has its own status, afterwards it is an error event, then `[DONE]`.
    """

    def __init__(self, generation: Generation, frames: Frames, headers: dict[str, str] | None = None) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class JsonAnswer:
    """`JsonAnswer(generation, body, headers)`: `body(choices)` makes the document once every choice has ended."""

    def __init__(
        self,
        generation: Generation,
        body: Callable[[list[ChoiceDelta]], Any],
        headers: dict[str, str] | None = None,
    ) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
