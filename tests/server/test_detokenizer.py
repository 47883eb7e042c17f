"""Streams of characters from streams of ids."""

import random

import pytest
import text_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.server.detokenizer import Detokenizer
from ropeway.server.tokenizer import TextTokenizer

TOKENIZERS = {
    make.__name__: TextTokenizer(make())
    for make in (
        text_samples.byte_level,
        text_samples.byte_fallback,
        text_samples.metaspace,
        text_samples.word_piece,
        text_samples.word_piece_bytes,
    )
}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def pieces(tokenizer: TextTokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [detokenizer.step(id) for id in ids] + [detokenizer.finish()]


def continuation(tokenizer: TextTokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    """What `decode` shows after the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode(prompt + ids, skip_special_tokens=skip).removeprefix(before)


@kinds
@pytest.mark.parametrize("text", text_samples.TEXTS)
def test_texts(kind: str, text: str) -> None:
    """Guards every script: what comes out in pieces is what decode gives whole, without one U+FFFD on the way."""
    tokenizer = TOKENIZERS[kind]
    prompt, ids = tokenizer._encode(["abc"], False), tokenizer._encode([text], False)
    streamed = pieces(tokenizer, prompt, ids)
    assert "".join(streamed) == continuation(tokenizer, prompt, ids)
    assert "\ufffd" not in "".join(streamed)


@given(text=st.text(max_size=60), cut=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_any_text_cut_anywhere(text: str, cut: int) -> None:
    """Guards generation that stops in the middle of a character: the rest is shown as decode shows it."""
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[kind]
        prompt = tokenizer._encode(["abc"], False)
        ids = tokenizer._encode([text], False)[:cut]
        streamed = pieces(tokenizer, prompt, ids)
        if kind == "byte_level" or "\ufffd" not in "".join(streamed):
            assert "".join(streamed) == continuation(tokenizer, prompt, ids)
        assert "\ufffd" not in "".join(streamed[:-1]) or "\ufffd" in text


def test_byte_fallback_shows_an_unfinished_character_as_decode_does() -> None:
    """Guards the tail: tokenizers writes one U+FFFD per byte there."""
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer._encode(["abc 👩"], False)[:-1]
    streamed = pieces(tokenizer, [], ids)
    assert "".join(streamed) == " abc \ufffd\ufffd\ufffd" and streamed[-1] == "\ufffd\ufffd\ufffd"
    assert tokenizer.decode(ids).endswith("c \ufffd\ufffd\ufffd")


@kinds
def test_random_ids_never_fail(kind: str) -> None:
    """Guards against a poison request: sampled ids are no text, and tokenizers' own stream raises on many of them."""
    tokenizer = TOKENIZERS[kind]
    generator = random.Random(0)
    size = tokenizer.backend.get_vocab_size() + 3  # ids beyond the vocabulary: the logits may be wider
    for _ in range(300):
        prompt = [generator.randrange(size) for _ in range(generator.randrange(12))]
        ids = [generator.randrange(size) for _ in range(40)]
        whole = "".join(pieces(tokenizer, prompt, ids))
        whole.encode()  # no half of a surrogate pair
        if kind == "byte_level":
            assert "".join(pieces(tokenizer, [5], ids)) == continuation(tokenizer, [5], ids)


@kinds
def test_special_tokens(kind: str) -> None:
    """Guards skip_special_tokens both ways."""
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.backend.token_to_id("<|im_end|>")
    ids = [*tokenizer._encode(["a"], False), end, *tokenizer._encode(["b"], False)]
    for skip in (True, False):
        text = "".join(pieces(tokenizer, ids[:1], ids, skip))
        assert text == continuation(tokenizer, ids[:1], ids, skip)
        assert ("<|im_end|>" in text) is not skip


@kinds
def test_kept_special_tokens(kind: str) -> None:
    """Guards parsers of tool calls: the tokens that mark them are text, every other special token stays out."""
    tokenizer = TOKENIZERS[kind]
    start, end = (tokenizer.backend.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    assert tokenizer.special_ids(["<|im_end|>", "a", "never"]) == {"<|im_end|>": end}
    a, b = tokenizer._encode(["a"], False), tokenizer._encode(["b"], False)
    detokenizer = Detokenizer(tokenizer, a, True, frozenset({end}))
    text = "".join([*map(detokenizer.step, [*b, start, end, *b, start]), detokenizer.finish()])
    assert text.replace(" ", "") == "b<|im_end|>b"


def test_first_space_survives() -> None:
    """Guards sentencepiece completions: "and" instead of " and" joins the words of prompt and output."""
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, ids = tokenizer._encode(["hello"], False), [tokenizer.backend.token_to_id("▁the")]
    assert "".join(pieces(tokenizer, prompt, ids)) == " the"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_begun_in_the_prompt(kind: str) -> None:
    """Guards prompts of ids that end in the middle of a character: the output completes it."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer._encode(["\U00010348"], False)
    assert len(ids) >= 4
    assert "".join(pieces(tokenizer, ids[:-1], ids[-1:])) == "\U00010348"
