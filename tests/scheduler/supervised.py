"""Fake servers (`fake_server.py`) as processes of their own, and their clients. Nothing sleeps for luck."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LIMIT_S = 60.0
SCRIPT = Path(__file__).with_name("fake_server.py")
PROMPT = {"prompt": [1, 2, 3, 4, 5, 6, 7], "max_tokens": 200, "n": 2, "seed": 11}


def wait_for(fact: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Polls until the fact is true; returns it."""
    deadline = time.monotonic() + limit_s
    while not (value := fact()):
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain for {what}"
        time.sleep(0.01)
    return value


class Answer:
    """One request on its own connection, read line by line."""

    def __init__(self, port: int, request: dict[str, Any]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._file = self._socket.makefile("rb")
        self.port = self._socket.getsockname()[1]
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}

    def next(self) -> dict[str, Any] | None:
        """Reads a line. None: tokens came; else the last line of the answer, or a status."""
        try:
            message = json.loads(self._file.readline() or '{"error": "closed"}')
        except ConnectionResetError:
            return {"error": "closed"}
        if isinstance(message, dict):
            return message
        for choice, token_ids, finish in message:
            self.tokens.setdefault(choice, []).extend(token_ids)
            if finish:
                self.finish[choice] = finish
        return None

    def rest(self) -> dict[str, Any]:
        """Reads to the end and closes; returns the last line."""
        try:
            while (message := self.next()) is None:
                pass
            return message
        finally:
            self.close()

    def read_tokens(self, count: int) -> None:
        """Until choice 0 has so many tokens."""
        while len(self.tokens.get(0, [])) < count:
            assert self.next() is None

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@dataclass
class Server:
    """A supervisor process with its children."""

    process: subprocess.Popen[str]
    port: int

    def status(self) -> dict[str, Any]:
        """As the worker sees it; empty if it cannot be asked now."""
        try:
            answer = Answer(self.port, {"status": True})
            message = answer.rest()
        except OSError:
            return {}
        return message if "ready" in message else {}

    def wait_ready(self, generation: int = 1, workers: int = 1) -> dict[str, Any]:
        """Until so many workers have said that they are ready: one may hear of it a moment after another."""
        seen: set[int] = set()

        def ready() -> dict[str, Any] | None:
            assert self.process.poll() is None
            status = self.status()
            if status.get("ready") and status["generation"] >= generation:
                seen.add(status["worker"])
            return status if len(seen) >= workers else None

        status: dict[str, Any] = wait_for(ready, f"generation {generation}")
        return status

    def ask(self, **request: Any) -> Answer:
        return Answer(self.port, request)

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(LIMIT_S)


def undisturbed(server: Server) -> dict[int, list[int]]:
    """What PROMPT gives when nothing happens."""
    answer = server.ask(**PROMPT)
    assert answer.rest() == {"done": True}
    assert {choice: len(tokens) for choice, tokens in answer.tokens.items()} == {0: 200, 1: 200}
    return answer.tokens


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def assert_nothing_left(family: list[psutil.Process], directory: str | None) -> None:
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert not alive
    assert directory is None or not Path(directory).exists()
