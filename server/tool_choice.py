"""OpenAI's `tool_choice`, checked against the request's tools. Knows no model and no grammar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ropeway.server.errors import invalid

SHAPES = "none, auto, required, or an object that names one of the request's tools"


@dataclass(slots=True, frozen=True)
class ToolChoice:
    """Whether there may be, or must be, calls, and of what."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    """Tools of which one must be called, with mode required."""
    named: bool = False
    """It was one tool by name: the answer is one call of it."""


def check_strict(function: dict[str, Any], param: str) -> None:
    """Raises: ApiError 400 for a function whose `strict` is neither true nor false."""
    if not isinstance(function.get("strict"), bool | None):
        raise invalid(f"{param}.strict must be true or false.", f"{param}.strict")


def read_tool_choice(given: Any, names: Sequence[str]) -> ToolChoice:
    """`names` are those of the request's tools. Raises: ApiError 400."""
    if given is None or given == "auto":
        return ToolChoice()
    if given == "none":
        return ToolChoice("none")
    kind = given.get("type") if isinstance(given, dict) else given
    if kind == "required":
        wanted = tuple(names)
    elif kind == "function":
        wanted = (_name(given),)
    elif kind == "allowed_tools":
        inner = given.get("allowed_tools", given)
        tools = inner.get("tools") if isinstance(inner, dict) else None
        if not isinstance(tools, list) or not tools or inner.get("mode") != "required":
            message = "tool_choice.allowed_tools must have tools, and mode required: this server enforces no other yet."
            raise invalid(message, "tool_choice", "unsupported_parameter")
        wanted = tuple(dict.fromkeys(map(_name, tools)))
    else:
        raise invalid(f"tool_choice must be {SHAPES}.", "tool_choice")
    if not names:
        raise invalid("tool_choice needs tools.", "tool_choice")
    for name in wanted:
        if name not in names:
            raise invalid(f"tool_choice names {name[:64]!r}, which is none of the request's tools.", "tool_choice")
    return ToolChoice("required", wanted, named=kind == "function")


def _name(given: Any) -> str:
    function = given.get("function", given) if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid(f"tool_choice must be {SHAPES}.", "tool_choice")
    return name
