"""The shapes of the corpus and how a conversation becomes text.

`render` writes exactly what the chat template writes (a test compares them); it exists because
rendering millions of training conversations through Jinja would be slow. Knows no tokenizer.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

START_TURN = "<|im_start|>"
END_TURN = "<|im_end|>"
END_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_TEXT, START_TURN, END_TURN, PAD)
MARKER_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TOOLS_LINE = 'You can call a tool with <tool_call>{"name": ..., "arguments": {...}}</tool_call>:'
THINK_LINE = "Think step by step before you answer."
HELD_OUT_SHARE = 20


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `content` holds tool calls as text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; parameters are (name, JSON type) pairs."""

    name: str
    description: str
    parameters: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """The tool in the shape the chat completions protocol uses."""
        properties = {name: {"type": kind} for name, kind in self.parameters}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Plain:
    """Text without turns: the model goes on from `prompt` with `answer`."""

    key: str
    prompt: str
    answer: str
    accept: Callable[[str], bool]
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Exchange:
    """Turns from a user's question to the assistant's last answer."""

    key: str
    turns: tuple[Turn, ...]
    accept: Callable[[str], bool]
    system: str | None = None
    tools: tuple[Tool, ...] = ()

    @property
    def answer(self) -> str:
        return self.turns[-1].content


def held_out(key: str) -> bool:
    """Whether a problem is kept for evaluation: one in `HELD_OUT_SHARE`, by hash of its key."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def any_of(*answers: str) -> Callable[[str], bool]:
    """Accept exactly one of these texts."""
    return frozenset(answers).__contains__


def starting_with(text: str) -> Callable[[str], bool]:
    """Accept every text that begins with `text`."""
    return lambda output: output.startswith(text)


def json_equal(value: object) -> Callable[[str], bool]:
    """Accept every text that parses to this JSON value."""

    def accept(output: str) -> bool:
        try:
            return bool(json.loads(output) == value)
        except ValueError:
            return False

    return accept


def ask(key: str, question: str, answers: Sequence[str], chosen: int = 0) -> Exchange:
    """A single question with its right answers, of which the chosen one is trained."""
    turns = (Turn("user", question), Turn("assistant", answers[chosen]))
    return Exchange(key, turns, any_of(*answers))


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{call}</tool_call>"


def signature(tool: Tool) -> str:
    """The line that presents a tool to the model."""
    parameters = ", ".join(f"{name}: {kind}" for name, kind in tool.parameters)
    return f"- {tool.name}({parameters}): {tool.description}"


def system_text(system: str | None, tools: Sequence[Tool]) -> str:
    """The content of the system turn; empty when there is none."""
    parts = [system] if system else []
    if tools:
        parts.append("\n".join([TOOLS_LINE, *map(signature, tools)]))
    return "\n\n".join(parts)


def render(turns: Sequence[Turn], system: str | None = None, tools: Sequence[Tool] = (), generate: bool = False) -> str:
    """The conversation as text; `generate` opens the assistant's next turn."""
    head = system_text(system, tools)
    all_turns = [Turn("system", head), *turns] if head else list(turns)
    text = "".join(f"{START_TURN}{turn.role}\n{turn.content}{END_TURN}\n" for turn in all_turns)
    return f"{text}{START_TURN}assistant\n" if generate else text


def prompt_text(problem: Plain | Exchange) -> str:
    """What the model is given to solve this problem."""
    if isinstance(problem, Plain):
        return problem.prompt
    return render(problem.turns[:-1], problem.system, problem.tools, generate=True)
