"""Calls that are written with tags instead of JSON, turned into JSON as they come. Knows tags and types, no markers.

    <function=NAME> <parameter=KEY> VALUE </parameter> ... </function>        Qwen3-Coder and its successors
    NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ...              GLM 4.5 and its successors

Values have no quotes: the tool's schema says whether "5" is a text. Texts stream; other values wait until they are
whole, and are texts after all if they are no JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from ropeway.server.growing_text import GrowingText, Sink, Steps, Unreadable
from ropeway.server.tool_formats import Tags

_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""What models write who think of Python."""


def tagged_name(text: GrowingText, tags: Tags) -> Steps[str]:
    """The name of a call, up to its first tag. Raises: Unreadable."""
    yield from text.spaces()
    if tags.name_open and not (yield from text.follows(tags.name_open)):
        raise Unreadable
    name = yield from text.word()
    if tags.name_close and not (yield from text.follows(tags.name_close)):
        raise Unreadable
    if not name or (yield from text.char()) != "<":
        raise Unreadable
    return name


def tagged_arguments(text: GrowingText, tags: Tags, schema: Mapping[str, Any], sink: Sink) -> Steps[None]:
    """Pairs of keys and values, and the tag behind them, as a JSON object.

    Args:
        schema: JSON Schema of the arguments; what it does not mention is a text.

    Raises: Unreadable where neither a key nor the end follows; what came before was passed on.
    """
    properties = schema.get("properties")
    between = "{"
    while (yield from text.char()) and (yield from text.follows(tags.key_open)):
        key: list[str] = []
        if not (yield from text.up_to((tags.key_close,), key.append)):
            raise Unreadable
        if tags.value_open and not ((yield from text.char()) and (yield from text.follows(tags.value_open))):
            raise Unreadable
        name = "".join(key).strip()
        sink(f"{between}{json.dumps(name, ensure_ascii=False)}: ")
        between = ", "
        if is_text(properties.get(name) if isinstance(properties, dict) else None):
            yield from _text_value(text, tags, sink)
        else:
            yield from _other_value(text, tags, sink)
    if tags.end and not (yield from text.follows(tags.end)):
        raise Unreadable
    sink("}" if between == ", " else "{}")


def is_text(schema: Any) -> bool:
    """Whether a value of this JSON Schema may be any string."""
    if not isinstance(schema, dict):
        return True
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        return any(is_text(choice) for choice in choices)
    kinds = schema.get("type", "string")
    return "string" in kinds if isinstance(kinds, list) else kinds == "string"


def _text_value(text: GrowingText, tags: Tags, sink: Sink) -> Steps[None]:
    """A string, passed on in pieces; where values stand on lines of their own, their line breaks are left out."""
    held = ""

    def escaped(piece: str) -> None:
        nonlocal held
        piece = held + piece
        held = "\n" if tags.lines and piece.endswith("\n") else ""
        sink(json.dumps(piece.removesuffix(held), ensure_ascii=False)[1:-1])

    sink('"')
    if tags.lines:
        yield from text.follows("\n")
    if not (yield from text.up_to((tags.value_close,), escaped)):
        raise Unreadable
    sink('"')


def _other_value(text: GrowingText, tags: Tags, sink: Sink) -> Steps[None]:
    parts: list[str] = []
    if not (yield from text.up_to((tags.value_close,), parts.append)):
        raise Unreadable
    value = "".join(parts).strip()
    value = _PYTHON.get(value, value)
    try:
        from_json(value, allow_inf_nan=False)
    except ValueError:
        value = json.dumps(value, ensure_ascii=False)
    sink(value)
