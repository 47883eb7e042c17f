"""Tags to JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.server.growing_text import GrowingText
from ropeway.server.tagged_arguments import is_text, tagged_arguments, tagged_name
from ropeway.server.tool_formats import TOOL_FORMATS, Tags

SCHEMA = {"properties": {"text": {"type": "string"}, "any": {"type": ["object", "array", "number", "boolean", "null"]}}}


def tags(name: str) -> Tags:
    found = TOOL_FORMATS[name].tags
    assert found is not None
    return found


def read(shape: Tags, written: str, size: int) -> tuple[str, str]:
    """The name and the arguments of a call that comes in pieces of a size."""
    text, got = GrowingText(), list[str]()

    def whole() -> Any:
        name = yield from tagged_name(text, shape)
        yield from tagged_arguments(text, shape, SCHEMA, got.append)
        return name

    steps = whole()
    try:
        for start in range(0, len(written), size):
            text.add(written[start : start + size])
            next(steps)
        text.ended = True
        next(steps)
    except StopIteration as end:
        return end.value, "".join(got)
    raise AssertionError("it waits for more")


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text().filter(lambda text: "</" not in text),
        "any": st.lists(st.integers()) | st.dictionaries(st.text("ab"), st.booleans()) | st.integers() | st.none(),
    },
)


@pytest.mark.parametrize("name", ["qwen-coder", "glm"])
@given(values=VALUES, size=st.integers(1, 50))
def test_round_trip(name: str, values: dict[str, Any], size: int) -> None:
    """Guards texts with quotes, line breaks and anything else: what the template would write is read as it was."""
    shape = tags(name)
    edge = "\n" if shape.lines else ""
    written = f" {shape.name_open}f_1{shape.name_close}\n"
    for key, value in values.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        written += f"{shape.key_open}{key}{shape.key_close}{shape.value_open}{edge}{shown}{edge}{shape.value_close}\n"
    got, arguments = read(shape, written + shape.end, size)
    assert (got, json.loads(arguments)) == ("f_1", values)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, True),
        ({"type": ["string", "null"]}, True),
        ({"enum": ["a", "b"]}, True),
        (None, True),
        ("nonsense", True),
        ({"type": "integer"}, False),
        ({"type": ["number", "null"]}, False),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, False),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, True),
    ],
)
def test_what_is_a_text(schema: Any, expected: bool) -> None:
    """Guards types: "5" for a string stays a string, for a number it is one; whatever schema a client sends."""
    assert is_text(schema) is expected


def test_odd_schemas() -> None:
    """Guards against a 500 for schemas that are none: their values are texts."""
    shape = tags("glm")
    text, got = GrowingText(), list[str]()
    text.add("<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>")
    with pytest.raises(StopIteration):
        next(tagged_arguments(text, shape, {"properties": [1]}, got.append))
    assert "".join(got) == '{"a": "1"}'
