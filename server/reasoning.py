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
        self._state = "within" if thinking else "before"

    def add(self, token_ids: Sequence[int]) -> int:
        """How many more tokens are known to belong to thoughts."""
        counted = 0
        for token_id in token_ids if self._state != "after" else ():
            self._seen += self._token_bytes(token_id)
            self._undecided += 1
            if self._state == "before":
                self._begin()
            if self._state == "within":
                counted += self._undecided
                self._undecided = 0
                self._look_for_end()
            if self._state == "after":
                break
        return counted

    def _begin(self) -> None:
        self._seen = self._seen.lstrip()
        if self._seen.startswith(self._open):
            self._state, self._seen = "within", self._seen.removeprefix(self._open)
        elif not self._open.startswith(self._seen):
            self._state = "after"

    def _look_for_end(self) -> None:
        if self._close in self._seen:
            self._state = "after"
        self._seen = self._seen[1 - len(self._close) :]
