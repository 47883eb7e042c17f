"""One HTTP exchange with an ASGI app, by hand: what httpx's transport hides (each message, leaving, a full socket)."""

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class Wire:
    """A client's side of one request."""

    def __init__(self, path: str = "/", body: Any = None, headers: dict[str, str] | None = None) -> None:
        head = {"content-type": "application/json"} | (headers or {})
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in head.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self._incoming: list[Message] = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        ]
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self.reading = asyncio.Event()
        """Cleared: the socket is full, sends wait."""
        self.reading.set()
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        if self._incoming:
            return self._incoming.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reading.wait()
        self.messages.append(message)
        self._news.set()

    def leave(self) -> None:
        self._gone.set()

    async def call(self, app: ASGIApp) -> None:
        await app(self.scope, self.receive, self.send)

    async def until(self, count: int) -> None:
        """Waits for so many messages."""
        while len(self.messages) < count:
            self._news.clear()
            await self._news.wait()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", False)


def events(body: bytes) -> list[Any]:
    """The JSON documents of an event stream that ends with [DONE]; checks the framing byte by byte."""
    assert body.endswith(b"data: [DONE]\n\n")
    found = []
    for block in body.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")[:-1]:
        if block == b": keep-alive":
            continue
        assert block.startswith(b"data: {") and b"\n" not in block and b"\r" not in block
        found.append(json.loads(block.removeprefix(b"data: "), parse_constant=_refuse))
    return found


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON")
