"""A small client for OpenAI-compatible servers, for `ropeway chat` and `ropeway run-batch`. Knows HTTP and SSE only."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

CONNECT_S = 10.0
"""Answers may take as long as they like; a connection may not."""
TIMEOUT = httpx.Timeout(None, connect=CONNECT_S)


class ServerError(Exception):
    """The server said no, or nothing: one sentence."""


def headers(api_key: str) -> dict[str, str]:
    """Of every request."""
    return {"Authorization": f"Bearer {api_key}"}


def events(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON documents of an event stream until `[DONE]`. Lines end at line feeds alone, as SSE has them.

    Raises: ServerError for an error event.
    """
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                document = json.loads(data)
                if error := document.get("error"):
                    raise ServerError(message_of(error))
                yield document


def message_of(error: Any) -> str:
    """What an error document says."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


class ChatServer:
    """One server's chat route. A context manager.

    Args:
        root: its address, without `/v1`.
        api_key: sent as a bearer token.
    """

    def __init__(self, root: str, api_key: str) -> None:
        self._http = httpx.Client(base_url=root, headers=headers(api_key), timeout=TIMEOUT)

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def model(self) -> str:
        """The first model that it lists. Raises: ServerError."""
        try:
            answer = self._http.get("/v1/models")
            self._check(answer)
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{self._http.base_url} lists no models: {error or type(error).__name__}") from None

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer; closing the iterator ends it on the server too. Raises: ServerError."""
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
                if answer.is_error:
                    answer.read()
                self._check(answer)
                yield from events(answer.iter_bytes())
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self._http.base_url} does not answer: {error or type(error).__name__}") from None

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_error:
            try:
                message = message_of(answer.json()["error"])
            except (ValueError, LookupError, TypeError):
                message = answer.text[:200] or answer.reason_phrase
            raise ServerError(f"{message} (status {answer.status_code})")
