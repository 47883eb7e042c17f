"""`ropeway chat` against a stand-in: history, commands, and servers that fail."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stand_in import Answer, StandIn, as_json, as_stream

from ropeway.server.chat_command import Talk
from ropeway.server.cli import main
from ropeway.server.openai_client import ChatServer, ServerError, events


def answer(path: str, body: Any) -> Answer:
    if path == "/v1/models":
        return as_json({"data": [{"id": "some/model"}]})
    question = body["messages"][-1]["content"]
    if question == "fail":
        return as_json({"error": {"message": "No room."}}, 503)
    return as_stream(
        {"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "so "}, {"content": question}
    )


class Terminal:
    """A conversation whose user types these lines."""

    def __init__(self, server: StandIn) -> None:
        self.screen = io.StringIO()
        self._chat = ChatServer(server.url, "key")
        self.talk = Talk(self._chat, "m", Console(file=self.screen, width=200))

    def type(self, *lines: str) -> str:
        """What the screen shows for them."""
        start, typed = self.screen.tell(), iter(lines)

        def read() -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        self.talk.run(read)
        return self.screen.getvalue()[start:]

    def close(self) -> None:
        self._chat.__exit__()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(answer) as running:
        yield running


@pytest.fixture
def terminal(server: StandIn) -> Iterator[Terminal]:
    made = Terminal(server)
    yield made
    made.close()


def test_history(server: StandIn, terminal: Terminal) -> None:
    """Guards the conversation: each request brings all of it, answers are shown with their thoughts."""
    shown = terminal.type("one", "", "two")
    assert "hmso one" in shown and "hmso two" in shown
    said = [message["content"] for message in server.asked[-1][1]["messages"]]
    assert said == ["one", "so one", "two"] and server.asked[-1][1]["stream"] is True


def test_commands(server: StandIn, terminal: Terminal, tmp_path: Path) -> None:
    """Guards /save, /load, /set, /system, /undo and /clear."""
    file = tmp_path / "talk.json"
    terminal.type("/system be brief", "/set temperature=0", "one", "two", "/undo", f"/save {file}")
    assert server.asked[-1][1]["temperature"] == 0
    saved = json.loads(file.read_text())
    assert [message["content"] for message in saved["messages"]] == ["be brief", "one", "so one"]
    terminal.type("/clear", f"/load {file}", "three", "/exit", "never")
    assert [message["content"] for message in server.asked[-1][1]["messages"]] == ["be brief", "one", "so one", "three"]


@pytest.mark.parametrize("line", ["/eat", "/save", "/save /nowhere/x", "/load /nowhere/x", "/set x", "fail"])
def test_mistakes(line: str, terminal: Terminal) -> None:
    """Guards the conversation: a mistake or a failure is a sentence, and the talk goes on without it."""
    shown = terminal.type(line, "one")
    assert shown.count("\n") >= 2 and "so one" in shown
    assert [message["content"] for message in terminal.talk.messages] == ["one", "so one"]


def test_command_line(server: StandIn, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the whole command: it finds the model, talks, and leaves at the end of its input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert main(["chat", "--url", f"{server.url}/v1", "--set", "top_p=0.5"]) == 0
    assert "some/model" in capsys.readouterr().out
    assert server.asked[-1][1]["model"] == "some/model" and server.asked[-1][1]["top_p"] == 0.5
    assert main(["chat", "--url", "ftp://x"]) == 2 and main(["chat", "--nonsense"]) == 2
    assert main(["chat", "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.count("ropeway: ") == 3


def test_events() -> None:
    """Guards the stream's reader: any cut into pieces, comments and separators beyond ASCII change nothing."""
    data = ': hi\n\ndata: {"a":"\u2028x"}\r\n\r\ndata:{"b":1}\n\ndata: [DONE]\n\ndata: {"c":1}\n\n'.encode()
    for size in (1, 3, 1000):
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert list(events(pieces)) == [{"a": "\u2028x"}, {"b": 1}]
    with pytest.raises(ServerError, match="no"):
        list(events([b'data: {"error": {"message": "no"}}\n\n']))
