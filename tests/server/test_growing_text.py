"""Readers of a text that comes in pieces."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.server.growing_text import GrowingText, Steps, Unreadable

Result = TypeVar("Result")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def read(reader: Callable[[GrowingText], Steps[Result]], pieces: list[str]) -> tuple[Result, str]:
    """What a reader returns, and what it left."""
    text = GrowingText()
    steps = reader(text)
    rest = iter(pieces)
    try:
        while True:
            next(steps)
            if piece := next(rest, ""):
                text.add(piece)
            else:
                text.ended = True
    except StopIteration as end:
        return end.value, text.text[text.at :] + "".join(rest)


def cuts(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [piece for piece in [*pieces, text] if piece]


@given(JSON, st.booleans(), st.sampled_from(["}", "]", ",", " x", '"', "}}"]), st.lists(st.integers(1, 9)))
def test_json_values(value: Any, ascii: bool, behind: str, sizes: list[int]) -> None:
    """Guards arguments: any JSON is taken whole and unchanged, and nothing behind it, for every cut."""
    document = json.dumps(value, ensure_ascii=ascii)
    if document[0] not in '{["':
        behind = f",{behind}"
    got: list[str] = []
    _, rest = read(lambda text: text.value(got.append), cuts(document + behind, sizes))
    assert ("".join(got), rest) == (document, behind)


@pytest.mark.parametrize("text", ['{"a": oops}', "{'a': 1}", "[1}", '{"a": [', '"a', '"a\\', "{<b>}", "{NaN}"])
def test_what_is_no_json(text: str) -> None:
    """Guards against swallowing the text behind a broken value: reading stops where it breaks."""
    for pieces in ([text], list(text)):
        got: list[str] = []
        with pytest.raises(Unreadable):
            read(lambda whole, got=got: whole.value(got.append), pieces)  # type: ignore[misc]
        assert text.startswith("".join(got)) and "oops" not in "".join(got)


@given(st.text("ab<>[", max_size=30), st.lists(st.integers(1, 5)))
def test_first_marker(text: str, sizes: list[int]) -> None:
    """Guards markers that begin alike or overlap: the first one in the text ends it, as a plain search finds it."""
    markers = ("<a>", "<ab>", "[<a")
    got: list[str] = []
    found, rest = read(lambda whole: whole.up_to(markers, got.append), cuts(text, sizes))
    places = [(text.find(marker), marker) for marker in markers if marker in text]
    place, expected = min(places) if places else (len(text), "")
    assert (found, "".join(got), rest) == (expected, text[:place], text[place + len(expected) :])


def test_passes_on_at_once() -> None:
    """Guards latency: only what may be the beginning of a marker waits."""
    text, got = GrowingText(), list[str]()
    steps = text.up_to(("<tool_call>",), got.append)
    for piece, expected in (("a <", "a "), ("b <tool", "<b "), ("_cat", "<tool_cat"), ("<tool_call", ""), (">x", "")):
        text.add(piece)
        got.clear()
        end = next(steps, "end")
        assert "".join(got) == expected
    assert end == "end" and text.text[text.at :] == "x"


def test_words_and_markers() -> None:
    """Guards names: a word ends at the first other character, a marker is taken whole or not at all."""
    for pieces in (["get_weather.v2[AR", "GS]{"], list("get_weather.v2[ARGS]{")):
        assert read(GrowingText.word, pieces) == ("get_weather.v2", "[ARGS]{")
    assert read(lambda text: text.follows("[ARGS]"), list("[ARGS]{")) == (True, "{")
    assert read(lambda text: text.follows("[ARGS]"), list("[ARK]")) == (False, "[ARK]")
    assert read(lambda text: text.follows("[ARGS]"), list("[AR")) == (False, "[AR")
    assert read(GrowingText.char, list(" \n\t")) == ("", "")
    assert read(GrowingText.string, list(' "a\\u00e9\\""x')) == ('aé"', "x")


def test_what_was_taken_can_be_given_back() -> None:
    """Guards the fallback to content: every character that a failed reader took was noted."""
    text = GrowingText()
    text.taken = []
    text.add(' {"name": 5')
    steps = text.char()
    with pytest.raises(StopIteration):
        next(steps)
    text.take(len(text.text))
    assert "".join(text.taken) == ' {"name": 5'
