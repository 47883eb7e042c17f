"""Grammars against vocabularies of the kinds that models have: what a mask allows must be text of the grammar."""

import json
import random
import re
from concurrent.futures import Future
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from ropeway.scheduler import grammar as module
from ropeway.scheduler.grammar import Grammars, InvalidGrammar, compile_grammar, load_tokenizer

SPARE = 37
"""Logits beyond the tokenizer's last id, as models have them that round their vocabulary up."""
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def byte_level() -> Tokenizer:
    """All bytes, some pieces, two special tokens."""
    pieces = ["<|end|>", "<|mark|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", '{"', '":', "ha", "Ġ1"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|mark|>"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Spaces are U+2581, other bytes have tokens of their own."""
    chars = [*'▁abh0123456789{}":,', "ab", "▁1", '{"']
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *chars]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def allowed(matcher: LLMatcher, vocabulary: int) -> list[int]:
    mask = matcher.compute_bitmask()
    return [id for id in range(vocabulary) if mask[id // 8] >> id % 8 & 1]


def walk(tokenizer: Tokenizer, grammar: str, rng: random.Random) -> str:
    """A random text of the grammar."""
    known = tokenizer.get_vocab_size()
    compiled = load_tokenizer(tokenizer.to_str(), known + SPARE)
    matcher, ids = compile_grammar(compiled, grammar), []
    while not matcher.is_stopped():
        choices = [id for id in allowed(matcher, compiled.vocab_size) if not compiled.is_special_token(id)]
        assert max(choices, default=0) < known, "a token that is no text"
        if matcher.is_accepting() and (not choices or rng.random() < 0.2):
            break
        ids.append(rng.choice(choices))
        assert matcher.consume_token(ids[-1])
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("pattern", ["[0-9]{3}", "(ab|ha)+", "a{0,5}h 1+", "[日é🙂]{2}"])
def test_masks_hold_text_to_the_grammar(make: Any, pattern: str) -> None:
    """Guards bytes of tokens, spaces as U+2581, and ids that are no text."""
    tokenizer = make()
    for seed in range(5):
        text = walk(tokenizer, f"start: /{pattern}/", random.Random(seed))
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_schema(make: Any) -> None:
    """Guards JSON: it parses and has what the schema asks for."""
    grammar = json.dumps({"grammars": [{"name": "answer", "json_schema": OBJECT}]})
    for seed in range(5):
        value = json.loads(walk(make(), grammar, random.Random(seed)))
        assert list(value) == ["a"] and type(value["a"]) is int


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('{"grammars": [{"name": "a", "json_schema": {"not": {}}}]}', "not"),
        ("start: /(/", "unclosed group"),
        ("start: there", "there"),
        ('start: foo\nfoo: foo "a"', "no text"),
    ],
)
def test_invalid_grammars(grammar: str, words: str) -> None:
    """Guards clients: the sentence names what is wrong; a grammar without any text does not end in a dead row."""
    tokenizer = load_tokenizer(byte_level().to_str(), 300)
    with pytest.raises(InvalidGrammar, match=words) as caught:
        compile_grammar(tokenizer, grammar)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= module.MAX_SENTENCE + 1


def test_a_tokenizer_that_changes_text() -> None:
    """Guards rows against dead ends: what makes other text of a text is refused in words."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InvalidGrammar, match="changes the text"):
        load_tokenizer(tokenizer.to_str(), 300)


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cache: the same text is compiled once, the ones used last are kept, errors too are remembered."""
    monkeypatch.setattr(module, "MAX_GRAMMARS", 2)
    grammars = Grammars(byte_level().to_str, 300)
    first = grammars.compile('start: "a"')
    broken: Future[LLMatcher] = grammars.compile("start: x")
    assert grammars.compile('start: "a"') is first and grammars.compile("start: x") is broken
    assert first.result().deep_copy().consume_token(tokens("a"))
    with pytest.raises(InvalidGrammar):
        broken.result()
    grammars.compile('start: "b"').result()
    assert grammars.compile("start: x") is broken and grammars.compile('start: "a"') is not first
    grammars.close()


def tokens(char: str) -> int:
    return int(byte_level().token_to_id(char))
