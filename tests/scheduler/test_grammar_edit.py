"""Rows that follow grammars, on the real engine: valid whatever happens, and the free rows beside them unchanged."""

import itertools
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from llguidance import LLMatcher
from test_same_tokens import VOCAB, Answers, Setup, _only, build, model, requests, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from ropeway.kernels.errors import EditError
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.grammar import COMPILE_SECONDS, GRAMMAR, Grammars
from ropeway.scheduler.grammar_edit import GrammarBuilder, banned, unpack
from ropeway.scheduler.messages import AddRequest, ChoiceStart, EditSpec
from ropeway.scheduler.row import rows_of

__all__ = ["model"]  # the fixture

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 4}},
    "required": ["n", "s"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " ?"},
}


def is_valid(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


GRAMMARS: list[tuple[str, Callable[[str], Any]]] = [
    ("start: /[0-9]{3}-[a-z]+;/", lambda text: re.fullmatch("[0-9]{3}-[a-z]+;", text)),
    (json.dumps({"grammars": [{"name": "answer", "json_schema": SCHEMA}]}), is_valid),
    ('start: "yes" | "no" | "nobody"', lambda text: text in ("yes", "no", "nobody")),
]
END = 0


def ascii_tokenizer() -> Tokenizer:
    """One end token, then the printable characters, a token each, and a newline."""
    pieces = ["<|end|>", "Ġ", *map(chr, range(33, 127)), "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


TOKENIZER = ascii_tokenizer()
BUILDERS = {GRAMMAR: GrammarBuilder(Grammars(TOKENIZER.to_str, VOCAB))}


def structured(request: AddRequest, grammar: str) -> AddRequest:
    """The request with a grammar, an end token and enough room for it."""
    params = SamplingParams(temperature=1.5, seed=request.request_id, stop_token_ids=(END,))
    edits = [EditSpec(GRAMMAR, {"grammar": grammar})]
    return msgspec.structs.replace(request, sampling=params, max_tokens=60, edits=edits)


def mixed() -> list[AddRequest]:
    """Every other request has a grammar."""
    grammars = itertools.cycle(grammar for grammar, _ in GRAMMARS)
    return [structured(one, next(grammars)) if one.request_id % 2 == 0 else one for one in requests()]


def text(tokens: list[int]) -> str:
    return str(TOKENIZER.decode([id for id in tokens if id != END]))


def check(answers: Answers) -> None:
    """Every finished answer with a grammar is a text of it."""
    checks = itertools.cycle(check for _, check in GRAMMARS)
    for request in mixed():
        if not request.edits:
            continue
        is_right = next(checks)
        for choice in request.choices:
            tokens, reason = answers[request.request_id, choice.index]
            assert reason in ("stop", "length")
            assert reason == "length" or is_right(text(tokens)), text(tokens)


def ready(engine: Engine, requests: list[AddRequest]) -> None:
    """Compiles what the requests need, so that each joins at the step in which it is added."""
    for request in requests:
        for spec in request.edits:
            BUILDERS[GRAMMAR]._grammars.compile(spec.args["grammar"]).exception()


@pytest.fixture(scope="module")
def alone(model: LlamaForCausalLM) -> Answers:
    """What each choice of each request gets with the engine to itself."""
    answers: Answers = {}
    for request in mixed():
        for choice in request.choices:
            engine = build(model, Setup(caching=False), BUILDERS)
            ready(engine, [request])
            answers |= run(engine, {0: [_only(request, choice.index)]})
    return answers


SETUPS = [Setup("packed", 0), Setup("packed", 1, 24, 48), Setup("padded", 1), Setup("padded", 0, 24, 48)]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_beside_free_rows(model: LlamaForCausalLM, alone: Answers, setup: Setup) -> None:
    """Guards validity, and free rows, against neighbours, chunks, preemption and lag."""
    engine = build(model, setup, BUILDERS)
    ready(engine, mixed())
    answers = run(engine, {at: mixed()[at::5] for at in range(5)})
    assert answers == alone
    check(answers)
    plain = run(build(model, Setup()), {0: requests()})
    assert all(answers[row] == plain[row] for row in plain if row[0] % 2)


def test_most_answers_end(alone: Answers) -> None:
    """Guards the tests above: answers are complete, and end without an end token where nothing may follow."""
    ended = [tokens for (number, _), (tokens, reason) in alone.items() if number % 2 == 0 and reason == "stop"]
    assert len(ended) >= 5 and any(END not in tokens for tokens in ended)


def test_resumed_after_a_crash(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards validity when another engine goes on: the state is that of the tokens that were sent before."""
    for request in mixed():
        tokens, reason = alone[request.request_id, 0]
        if len(tokens) < 2 or not request.edits:
            continue
        sent = tokens[: len(tokens) // 2]
        resumed = _only(request, 0)
        resumed = msgspec.structs.replace(resumed, choices=[ChoiceStart(0, sent)])
        engine = build(model, Setup(lag=1, chunk=16), BUILDERS)
        ready(engine, [resumed])
        assert run(engine, {0: [resumed]}) == {(request.request_id, 0): (tokens[len(sent) :], reason)}


def test_a_wrong_grammar_ends_its_own_row(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards everybody else against what a worker should not have let through."""
    broken = [structured(one, "start: nothing") if one.request_id == 4 else one for one in mixed()]
    engine = build(model, Setup(lag=1), BUILDERS)
    ready(engine, broken)
    answers = run(engine, {0: broken})
    own = {row for row in answers if row[0] == 4}
    assert own and all(answers[row] == ([], "error") for row in own)
    assert {row: answer for row, answer in answers.items() if row not in own} == {
        row: answer for row, answer in alone.items() if row[0] != 4
    }


class Slow:
    """Grammars that are never compiled."""

    def __init__(self) -> None:
        self.future: Future[LLMatcher] = Future()

    def compile(self, grammar: str) -> "Future[LLMatcher]":
        return self.future


def test_waits_for_its_grammar_then_gives_up() -> None:
    """Guards the queue: a row whose grammar compiles is not ready; one whose grammar never will gets a sentence."""
    now = 0.0
    builder = GrammarBuilder(Slow(), lambda: now)  # type: ignore[arg-type]
    row = rows_of(structured(requests()[0], "start: /a/"), 0, 1000)[0]
    edit = builder({"grammar": "start: /a/"}, row)
    assert not edit.ready and edit.stop_reason([*row.prompt_ids, 5]) is None
    now = COMPILE_SECONDS + 1
    assert edit.ready
    with pytest.raises(EditError, match="took longer"):
        edit.edit(row.prompt_ids, torch.zeros(VOCAB))


def test_masks_are_computed_beside_the_engine() -> None:
    """Guards the engine's thread: after a token the next mask is begun, not waited for."""

    class Pool(ThreadPoolExecutor):
        begun = 0

        def submit(self, *args: Any, **options: Any) -> Any:
            self.begun += 1
            return super().submit(*args, **options)

    grammars = Grammars(TOKENIZER.to_str, VOCAB)
    builder = GrammarBuilder(grammars, time.monotonic)
    builder._threads = pool = Pool(1)
    row = rows_of(structured(requests()[0], "start: /ab+/"), 0, 1000)[0]
    edit = builder({"grammar": "start: /ab+/"}, row)
    edit._compiled.result()
    a, b = (TOKENIZER.token_to_id(char) for char in "ab")
    assert edit.stop_reason([*row.prompt_ids, a]) is None and pool.begun == 1
    scores = torch.zeros(VOCAB)
    edit.edit([*row.prompt_ids, a], scores)
    assert pool.begun == 1 and scores.isfinite().nonzero().flatten().tolist() == [b]
    scores = torch.zeros(VOCAB)
    edit.edit([*row.prompt_ids, a, b], scores)
    assert scores.isfinite().nonzero().flatten().tolist() == [END, b]


def test_unpack() -> None:
    """Guards the order of bits, and widths that are no multiple of 8."""
    packed = torch.tensor([0b00000101, 0b10000000, 0xFF], dtype=torch.uint8)
    assert unpack(packed, 17).nonzero().flatten().tolist() == [0, 2, 15, 16]
    assert (~banned(packed.numpy(), 17, torch.device("cpu"))).nonzero().flatten().tolist() == [0, 2, 15, 16]
