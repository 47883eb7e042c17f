"""`ropeway chat`: a conversation in the terminal, with any OpenAI-compatible server. Knows history and commands.

Ctrl-C ends an answer, not the conversation; what was said so far stays in it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ropeway.server.command_line import Parser, add_server_flags, root_url
from ropeway.server.errors import UsageError
from ropeway.server.openai_client import ChatServer, ServerError

HELP = """\
/save FILE       write the conversation, as JSON
/load FILE       go on with one that was saved
/set NAME=VALUE  a field of the request, such as temperature=0 (null takes it back)
/system TEXT     what the model is told first
/undo            take the last question back
/clear           begin anew
/exit            or Ctrl-D"""


def main(arguments: Sequence[str]) -> int:
    """Talks until the user leaves; returns the exit code. Raises: UsageError."""
    options = build_parser().parse_args(arguments)
    console = Console(highlight=False)
    with ChatServer(root_url(options.url), options.api_key) as server:
        try:
            model = options.model or server.model()
        except ServerError as error:
            raise UsageError(f"{str(error).rstrip('.')}.") from None
        talk = Talk(server, model, console)
        if options.system:
            talk.system(options.system)
        for text in options.set:
            talk.set(text)
        console.print(f"[bold]{model}[/bold] [dim]/help lists commands, Ctrl-D leaves[/dim]", soft_wrap=True)
        talk.run(lambda: console.input("[bold]> [/bold]"))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("ropeway chat", description="Talk to a model in the terminal, through an OpenAI-compatible server.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="its name; default: the first that the server lists")
    add_server_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of every request")
    return parser


class Talk:
    """One conversation.

    Args:
        server: answers.
        model: its name.
        console: where answers go.
    """

    def __init__(self, server: ChatServer, model: str, console: Console) -> None:
        self._server = server
        self._model = model
        self._console = console
        self._fields: dict[str, Any] = {}
        self.messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self.save, "/load": self.load, "/set": self.set, "/system": self.system, "/undo": self.undo,
            "/clear": self.clear, "/help": lambda _: console.print(HELP, markup=False),
        }  # fmt: skip

    def run(self, read: Callable[[], str]) -> None:
        """Until /exit or the end of the input."""
        while True:
            try:
                line = read().strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line in ("/exit", "/quit"):
                return
            try:
                self._do(line)
            except (UsageError, ServerError) as error:
                self._console.print(str(error), style="red", markup=False, soft_wrap=True)

    def _do(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UsageError(f"There is no {name}; /help lists what there is.")

    def ask(self, question: str) -> None:
        """Prints the answer as it comes; thoughts are dim. A question that fails is no part of the history."""
        self.messages.append({"role": "user", "content": question})
        answer = ""
        body = {"model": self._model, "messages": self.messages, **self._fields}
        try:
            for chunk in self._server.stream(body):
                for choice in chunk.get("choices", ())[:1]:
                    delta = choice.get("delta", {})
                    thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
                    self._console.print(thought, end="", style="dim", markup=False, soft_wrap=True)
                    text = delta.get("content") or ""
                    self._console.print(text, end="", markup=False, soft_wrap=True)
                    answer += text
        except KeyboardInterrupt:
            pass
        except ServerError:
            self.messages.pop()
            raise
        self._console.print()
        self.messages.append({"role": "assistant", "content": answer})

    def save(self, file: str) -> None:
        """Writes model, fields and messages."""
        if not file:
            raise UsageError("/save wants a file.")
        document = {"model": self._model, "fields": self._fields, "messages": self.messages}
        try:
            Path(file).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}.") from None
        self._console.print(f"Saved {file}.", markup=False)

    def load(self, file: str) -> None:
        """Takes messages and fields of a saved conversation."""
        try:
            document = json.loads(Path(file).read_text(encoding="utf-8"))
            messages, fields = list(document["messages"]), dict(document.get("fields", {}))
        except (OSError, ValueError, LookupError, TypeError):
            raise UsageError(f"{file or 'Nothing'} is no saved conversation.") from None
        self.messages, self._fields = messages, fields
        self._console.print(f"{len(messages)} messages.")

    def set(self, text: str) -> None:
        """A field of every request from now on."""
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError("/set wants NAME=VALUE, such as temperature=0.")
        try:
            self._fields[name.strip()] = json.loads(value)
        except ValueError:
            self._fields[name.strip()] = value.strip()

    def system(self, text: str) -> None:
        """Replaces the system message."""
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    def undo(self, _: str = "") -> None:
        """Takes the last question and its answer back."""
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[asked[-1] if asked else len(self.messages) :]

    def clear(self, _: str = "") -> None:
        """Forgets everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
