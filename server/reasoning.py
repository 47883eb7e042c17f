"""Reasoning as a request asks for it and as usage counts it. Knows template variables and tokens, no text's meaning."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

from ropeway.server.errors import invalid
from ropeway.server.tool_formats import ReasoningFormat

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thinking on and off."""
OWN = ("messages", "tools", "add_generation_prompt")
"""What the request itself gives to the template."""


def template_variables(
    effort: Effort | None, given: Mapping[str, Any] | None, known: Set[str], reasons: bool
) -> tuple[dict[str, Any], list[str]]:
    """What a request's `reasoning_effort` and `chat_template_kwargs` mean for a template.

    Args:
        effort: as OpenAI names it.
        given: the kwargs; they win.
        known: the template's variables.
        reasons: whether the model writes thoughts at all; to ask one that does not for none is granted.

    Returns the variables, and the names of fields that change nothing.
    Raises: ApiError 400 for kwargs that are fields of the request.
    """
    for name in OWN:
        if name in (given or {}):
            raise invalid(f"chat_template_kwargs must not have {name}: it is no variable.", "chat_template_kwargs")
    wanted: dict[str, Any] = {}
    if effort is not None:
        wanted = dict.fromkeys(SWITCHES, effort != "none") | {"reasoning_effort": effort}
    variables = {name: value for name, value in wanted.items() if name in known}
    ignored = ["reasoning_effort"] if wanted and not variables and (reasons or effort != "none") else []
    ignored += [f"chat_template_kwargs.{name}" for name in given or {} if name not in known]
    return variables | dict(given or {}), ignored


class ReasoningTokens:
    """Counts the tokens of one choice's thoughts, markers included; the same number however they come.

    Args:
        shape: the markers.
        thinking: the prompt has opened the thoughts.
        token_bytes: what a token adds to the text; b"" for what is left out of it.
    """

    def __init__(self, shape: ReasoningFormat, thinking: bool, token_bytes: Callable[[int], bytes]) -> None:
        self._open, self._close = shape.open.encode(), shape.close.encode()
        self._token_bytes = token_bytes
        self._seen = b""
        """As much of the text as decides what comes next."""
        self._undecided = 0
        """Tokens before it was known whether there are thoughts."""
        self._state = "within" if thinking else "before"

    def add(self, token_ids: Sequence[int]) -> int:
        """How many more tokens are known to belong to thoughts."""
        if self._state == "after":
            return 0
        pieces = list(map(self._token_bytes, token_ids))
        counted = 0
        if self._state == "before":
            taken = self._begin(pieces)
            if self._state != "within":
                return 0
            counted, pieces = self._undecided, pieces[taken:]
        return counted + self._within(pieces)

    def _begin(self, pieces: list[bytes]) -> int:
        """Looks for the opening marker; returns how many pieces that took."""
        for taken, piece in enumerate(pieces, start=1):
            self._undecided += 1
            self._seen = (self._seen + piece).lstrip()
            if self._seen.startswith(self._open):
                self._state, self._seen = "within", self._seen.removeprefix(self._open)
                return taken
            if not self._open.startswith(self._seen):
                self._state = "after"
                return taken
        return len(pieces)

    def _within(self, pieces: list[bytes]) -> int:
        """How many of the pieces stand before the end of the closing marker."""
        text = self._seen + b"".join(pieces)
        end = text.find(self._close)
        if end < 0:
            self._seen = text[1 - len(self._close) :]
            return len(pieces)
        self._state = "after"
        left = end + len(self._close) - len(self._seen)
        counted = 0
        while left > 0:
            left -= len(pieces[counted])
            counted += 1
        return counted
