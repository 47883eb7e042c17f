"""What a request asks of a template about thinking, and how the tokens of thoughts are counted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.server.errors import ApiError
from ropeway.server.reasoning import ReasoningTokens, template_variables
from ropeway.server.tool_formats import REASONING_FORMATS

THINK = REASONING_FORMATS["think"]
QWEN, OSS, NONE = {"enable_thinking", "messages"}, {"reasoning_effort"}, {"messages"}


@pytest.mark.parametrize(
    ("effort", "given", "known", "reasons", "variables", "ignored"),
    [
        (None, None, QWEN, True, {}, []),
        ("none", None, QWEN, True, {"enable_thinking": False}, []),
        ("low", None, QWEN, True, {"enable_thinking": True}, []),
        ("none", None, {"thinking"}, True, {"thinking": False}, []),
        ("high", None, OSS, True, {"reasoning_effort": "high"}, []),
        ("high", None, OSS | QWEN, True, {"reasoning_effort": "high", "enable_thinking": True}, []),
        ("high", {"enable_thinking": False}, QWEN, True, {"enable_thinking": False}, []),
        ("high", None, NONE, True, {}, ["reasoning_effort"]),
        ("none", None, NONE, True, {}, ["reasoning_effort"]),
        ("high", None, NONE, False, {}, ["reasoning_effort"]),
        ("none", None, NONE, False, {}, []),
        (None, {"documents": [], "x": 1}, {"documents"}, False, {"documents": [], "x": 1}, ["chat_template_kwargs.x"]),
    ],
)
def test_variables(effort: Any, given: Any, known: set[str], reasons: bool, variables: Any, ignored: Any) -> None:
    """Guards effort: it means what the template understands, kwargs win, and what changes nothing is named."""
    assert template_variables(effort, given, known, reasons=reasons) == (variables, ignored)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_the_requests_own_fields_are_no_variables(name: str) -> None:
    """Guards the checks on messages: kwargs must not be a way around them, nor a 500."""
    with pytest.raises(ApiError) as caught:
        template_variables(None, {name: []}, {name}, reasons=False)
    assert (caught.value.status, caught.value.param) == (400, "chat_template_kwargs")


CASES = [
    (False, ["<think>", "a", " b", "</think>", "\n", "c"], 4),
    (False, [" \n", "<", "thi", "nk>a", "b</", "think", ">c", "d</think>"], 7),
    (False, ["<think>a</think>b", "c"], 1),
    (False, ["<thi", "ck>", "</think>"], 0),
    (False, ["<thi"], 0),
    (False, ["a", "<think>", "b"], 0),
    (False, ["", "", "<think>", "a", ""], 5),
    (True, ["a", "b", "</think>", "c"], 3),
    (True, ["<", "/", "t", "h", "i", "n", "k", "<", "/think", "</", "think>", "c"], 11),
    (True, ["a", "b", ""], 3),
    (False, [], 0),
]


@given(st.sampled_from(CASES), st.lists(st.integers(0, 12)))
def test_counts(case: tuple[bool, list[str], int], cuts: list[int]) -> None:
    """Guards usage: the same number for a stream and a whole answer, whatever tokens the markers are made of."""
    thinking, texts, expected = case
    tokens = ReasoningTokens(THINK, thinking, lambda id: texts[id].encode())
    ids, counted = list(range(len(texts))), 0
    for cut in [*cuts, len(ids)]:
        counted += tokens.add(ids[:cut])
        ids = ids[cut:]
    assert counted == expected


def test_counting_forgets() -> None:
    """Guards the event loop: a long thought is not kept."""
    tokens = ReasoningTokens(THINK, True, lambda id: b"abc")
    assert tokens.add(range(10_000)) == 10_000
    assert len(tokens._seen) < 20
