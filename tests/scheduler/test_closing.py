"""JSON that is complete within max_tokens, whatever the scores say; and the search for its end."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import ropeway.server
from ropeway.kernels.errors import EditError
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.closing import LIKELIEST, STEP_LETTERS, STEP_TRIED, Closing, NoEnd
from ropeway.scheduler.grammar import Grammars
from ropeway.scheduler.grammar_edit import GrammarBuilder
from ropeway.scheduler.messages import AddRequest, ChoiceStart
from ropeway.scheduler.row import Row, rows_of
from ropeway.scheduler.shortest_end import Alphabet

TOKENIZER = Tokenizer.from_file(str(Path(ropeway.server.__path__[0]) / "demo_model" / "tokenizer.json"))
VOCAB = TOKENIZER.get_vocab_size()
END = TOKENIZER.token_to_id("<|im_end|>")
GRAMMARS = Grammars(TOKENIZER.to_str, VOCAB)
BUILD = GrammarBuilder(GRAMMARS)
PROMPT = [5]
THINK = TOKENIZER.token_to_id("</think>")
THOUGHTS = [
    ("###", ("###",), r"thoughts[lazy]: /(.|\n)*###/"),
    ("</think>", (), f"thoughts: TEXT <[{THINK}]>\nTEXT: /(.|\\n)*/"),
]
"""The closing marker, spelled in text and as a token of its own."""


def whole(schema: Any, start: str = "@answer", rules: str = "") -> str:
    """The grammar of one schema's texts, as the server writes it."""
    document = ({} if schema is True else schema) | {"x-guidance": {"whitespace_pattern": "( |\\n[ \\t]{0,24})"}}
    grammars = [
        {"name": "whole", "lark_grammar": f"start: {start}\n{rules}"},
        {"name": "answer", "json_schema": document},
    ]
    return json.dumps({"grammars": grammars})


def closing(grammar: str, endings: tuple[str, ...] = ()) -> Closing:
    return Closing(GRAMMARS.alphabet, GRAMMARS.compile(grammar, letters=True).result(), endings)


def a_row(max_tokens: int, output: list[int]) -> Row:
    params = SamplingParams(stop_token_ids=(END,))
    return rows_of(AddRequest(1, 1, PROMPT, params, max_tokens, [ChoiceStart(0, output)]), 0, 10**6)[0]


def generate(grammar: str, max_tokens: int, seed: int, crash_at: int = -1, endings: tuple[str, ...] = ()) -> Any:
    """(text, why it ended, tokens) of a row whose scores are noise. At `crash_at` tokens another edit goes on."""
    row = a_row(max_tokens, [])
    args = {"grammar": grammar, "endings": list(endings)}
    edit, noise = BUILD(args, row), torch.Generator().manual_seed(seed)
    ids: list[int] = [*PROMPT]
    while True:
        GRAMMARS.compile(grammar).result(), GRAMMARS.compile(grammar, letters=True).result()
        scores = torch.randn(VOCAB, generator=noise) * 3
        edit.edit(ids, scores)
        ids.append(int(torch.multinomial(scores.softmax(0), 1, generator=noise)))
        reason = edit.stop_reason(ids)
        output = [id for id in ids[len(PROMPT) :] if id != END]
        if reason is not None or ids[-1] == END or len(ids) == row.max_length:
            text = GRAMMARS.tokenizer.decode_bytes(output).decode()
            return text, "stop" if reason is not None or ids[-1] == END else "length", ids
        if len(output) == crash_at:
            edit = BUILD(args, a_row(max_tokens, output))


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Nested ones, with what makes their shortest texts long."""
    numbers = st.tuples(st.integers(-2000, 2000), st.integers(0, 300)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    )
    leaves = st.one_of(
        st.just({"type": "string"}),
        st.integers(1, 6).map(lambda least: {"type": "string", "minLength": least, "maxLength": least + 8}),
        st.sampled_from([{"type": "string", "pattern": "^(ab|c){2,4}$"}, {"type": "string", "format": "date"}]),
        st.sampled_from([{"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"type": "object"}]),
        st.lists(st.sampled_from(["x", "a long one", 3, None, "ünï"]), min_size=1, unique=True).map(
            lambda e: {"enum": e}
        ),
        numbers,
    )

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.dictionaries(st.sampled_from(["a", "b", "long name", "é"]), inner, min_size=1)
        objects = st.tuples(names, st.integers(0, 4), st.booleans()).map(
            lambda of: {
                "type": "object",
                "properties": of[0],
                "required": list(of[0])[: of[1]],
                "additionalProperties": of[2],
            }
        )
        arrays = st.tuples(inner, st.integers(0, 2)).map(
            lambda of: {"type": "array", "items": of[0], "minItems": of[1], "maxItems": of[1] + 2}
        )
        return st.one_of(objects, arrays, inner.map(lambda one: {"anyOf": [one, {"type": "null"}]}))

    return st.recursive(leaves, nested, max_leaves=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schemas(), st.integers(0, 2**31), st.integers(0, 30))
def test_complete_within_any_length(schema: dict[str, Any], seed: int, more: int) -> None:
    """Guards the promise: from the shortest text's length upwards every answer is complete, whatever is sampled."""
    grammar = whole(schema)
    for most in (len(closing(grammar).end), len(closing(grammar).end) + more):
        text, reason, ids = generate(grammar, most, seed)
        assert reason == "stop" and len(ids) <= most + len(PROMPT)
        jsonschema.validate(json.loads(text), schema)


LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def test_recursion() -> None:
    """Guards schemas that refer to themselves: a list is closed at every depth."""
    rng, depths = random.Random(1), set()
    for _ in range(20):
        text, reason, _ = generate(whole(LIST), rng.randrange(12, 120), rng.randrange(2**31))
        jsonschema.validate(json.loads(text), LIST)
        assert reason == "stop"
        depths.add(text.count("{"))
    assert len(depths) > 2


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        ({"type": "object"}, "{}"),
        ({"enum": ["long", "b", 170]}, '"b"'),
        ({"type": "array", "items": {"enum": ["aaa", "b"]}, "minItems": 2}, '["b","b"]'),
        ({"type": "integer", "minimum": 95}, "95"),
        ({"type": "string", "pattern": "^[^,]*x$"}, '"x"'),
        (LIST, '{"v":0,"next":null}'),
    ],
)
def test_shortest(schema: dict[str, Any], shortest: str) -> None:
    """Guards budgets: what is found is as short as can be."""
    assert len(closing(whole(schema)).end) == len(GRAMMARS.tokenizer.tokenize_str(shortest))


@pytest.mark.parametrize(("marker", "endings", "rules"), THOUGHTS)
def test_after_thoughts(marker: str, endings: tuple[str, ...], rules: str) -> None:
    """Guards reasoning: thoughts are ended in time for the answer behind them."""
    grammar = whole(LIST, r"thoughts /\n{0,2}/ @answer", rules)
    least = len(closing(grammar, endings).end)
    for seed in range(8):
        text, reason, _ = generate(grammar, least + 3 * seed, seed, endings=endings)
        jsonschema.validate(json.loads(text.partition(marker)[2]), LIST)
        assert reason == "stop"


def test_goes_on_after_a_crash() -> None:
    """Guards rows that another engine takes up: it knows an end that fits, the same one."""
    grammar = whole({"type": "object", "properties": {"s": {"type": "string", "minLength": 9}}, "required": ["s"]})
    for most in (12, 30):
        alone = generate(grammar, most, 3)
        assert alone[1] == "stop"
        assert all(generate(grammar, most, 3, crash_at) == alone for crash_at in range(1, len(alone[2]) - 1))


def test_grammar_without_a_text() -> None:
    """Guards the search: one that finds nothing says so instead of going on for ever."""
    with pytest.raises(NoEnd):
        closing(json.dumps({"grammars": [{"name": "whole", "lark_grammar": "start: /[,]{9000}/"}]}))


LONG = {"type": "array", "items": {"type": "string", "pattern": "^[A-Za-z0-9_]{8}-[a-z0-9]{8}$"}, "minItems": 60}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each look at what may follow, which is what a search costs."""
    looks: list[None] = []
    allowed = Alphabet.allowed
    monkeypatch.setattr(Alphabet, "allowed", lambda *args: (looks.append(None), allowed(*args))[1])
    return looks


def test_a_step_searches_within_a_budget(looks: list[None]) -> None:
    """Guards the engine: a schema whose end is long and hard to find stalled all rows, seconds at every token."""
    one = closing(whole({"anyOf": [{"type": "null"}, LONG]}))
    looks.clear()
    one.fitting([id for id in range(VOCAB) if GRAMMARS.tokenizer.decode_bytes([id]).startswith(b"[")], 10**6)
    assert len(looks) < 2 * STEP_TRIED


def test_the_longer_the_end_the_fewer_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the engine: ends of thousands of letters were read again for each of 64 tokens, while all rows waited."""
    one = closing(whole(LIST))
    tokens = [0] * LIKELIEST
    monkeypatch.setattr(one, "_known_end", lambda token_id, left: ([], []))
    assert len(one.fitting(tokens, 100)) == LIKELIEST
    one.path = [0] * (STEP_LETTERS // 3)
    assert len(one.fitting(tokens, 100)) == 2
    one.path = [0] * STEP_LETTERS
    assert len(one.fitting(tokens, 100)) == 1


def test_an_answer_without_an_end_says_so() -> None:
    """Guards the sentence for the client: what a thread found out was shown as an exception's name."""
    grammar = whole(LIST)
    GRAMMARS.compile(grammar).result(), GRAMMARS.compile(grammar, letters=True).result()
    edit = BUILD({"grammar": grammar, "endings": []}, a_row(1, GRAMMARS.tokenizer.tokenize_str('{"v')))
    with pytest.raises(EditError, match="cannot be completed"):
        edit.edit([*PROMPT, *GRAMMARS.tokenizer.tokenize_str('{"v')], torch.zeros(VOCAB))


def test_the_engine_does_not_search_what_is_known(looks: list[None]) -> None:
    """Guards the engine's thread: the end of the empty text, which took seconds to find, was searched there again."""
    grammar = whole(LONG)
    args = {"grammar": grammar, "endings": [], "end": closing(grammar).path}
    GRAMMARS.compile(grammar).result()
    edit = BUILD(args, a_row(2000, []))
    looks.clear()
    assert edit.ready and edit.stop_reason(PROMPT) is None and not looks
