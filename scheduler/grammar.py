"""Grammars: compiled by llguidance against the model's vocabulary, in threads, and kept. No torch, no rows, no HTTP.

Engine and API workers use it alike: a worker compiles what a client sends before it answers, the engine compiles it
again (a grammar is text when it crosses the processes) and follows each row's tokens with a copy of the compiled one.

A matcher's end token is never asked for: whether an answer may end is `is_accepting()`, and which tokens end a row is
the row's own business.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ropeway.scheduler.shortest_end import Alphabet

GRAMMAR = "grammar"
"""Kind of the `EditSpec`; its args: `grammar`, as llguidance reads it; and, for a text that must be complete within
max_tokens, `endings`: texts that may end what is free in it, and `end`: its shortest text, in the alphabet's letters
(which is searched if it is not given)."""
COMPILE_SECONDS = 10.0
"""A grammar that takes longer is refused."""
MAX_GRAMMARS = 256
"""Compiled ones that are kept."""
SAMPLE = '{"a": [-1.5, "B c"], "D":  true}\n'
"""A tokenizer that gives it back can follow grammars."""
MAX_SENTENCE = 400
"""Characters of llguidance's complaint that are passed on."""


class InvalidGrammar(Exception):
    """The grammar cannot be honoured; the message says why, for the client."""


def load_tokenizer(text: str, vocab_size: int) -> LLTokenizer:
    """The vocabulary as llguidance sees it. About a second for 128,000 tokens.

    Args:
        text: of the tokenizer.json that `text_export` wrote.
        vocab_size: width of the logits. Ids without a token in the tokenizer stand for no text, so that no grammar
            allows them.

    Raises: InvalidGrammar for a kind of tokenizer that llguidance does not read.
    """
    try:
        # It wants to know an end token; any one that stands for no text will do.
        tokenizer = LLTokenizer(text, n_vocab=max(vocab_size, _known_ids(text)), eos_token=_textless_id(text))
    except ValueError as error:
        raise InvalidGrammar(f"this model's tokenizer cannot follow grammars: {sentence(str(error))}") from error
    # Where only one text can follow, llguidance allows the tokens that the tokenizer makes of it.
    if tokenizer.decode_bytes(tokenizer.tokenize_str(SAMPLE)) != SAMPLE.encode():
        raise InvalidGrammar("this model's tokenizer cannot follow grammars: it changes the text.")
    return tokenizer


def _known_ids(text: str) -> int:
    """One more than the largest id of a tokenizer.json."""
    document = json.loads(text)
    vocabulary = document["model"].get("vocab") or []
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in document.get("added_tokens") or [])], default=0)


def _textless_id(text: str) -> int | None:
    """The first special token."""
    added: list[dict[str, Any]] = json.loads(text).get("added_tokens") or []
    return next((int(token["id"]) for token in added if token["special"]), None)


def sentence(complaint: str) -> str:
    """The first line of what llguidance says and, where it quotes a regular expression, what is wrong with that."""
    lines = complaint.strip().splitlines() or [""]
    line = " ".join([lines[0], *(line for line in lines[1:] if line.startswith("error: "))])
    return line[:MAX_SENTENCE].rstrip(". ") + "."


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of the grammar. Releases the GIL while it compiles. Raises: InvalidGrammar."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        raise InvalidGrammar(sentence(matcher.get_error()))
    mask = matcher.compute_bitmask()
    if matcher.is_error() or (not matcher.is_accepting() and not any(mask)):
        raise InvalidGrammar("it matches no text.")
    matcher.reset()
    return matcher


class Grammars:
    """Compiles grammars in its own threads and keeps the last ones.

    Args:
        read: gives the text of the tokenizer.json, once the first grammar wants it.
        vocab_size: width of the logits.
    """

    def __init__(self, read: Callable[[], str], vocab_size: int) -> None:
        self._read, self._vocab_size = read, vocab_size
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="grammar")
        self._kept: OrderedDict[tuple[str, bool], Future[LLMatcher]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._alphabet: Alphabet | None = None
        self._lock = Lock()

    def compile(self, grammar: str, letters: bool = False) -> "Future[LLMatcher]":
        """A matcher that stays as it is: `deep_copy` it to follow a text. Never waits; the future may raise
        InvalidGrammar. To be called from one thread.

        Args:
            letters: for the alphabet instead of the model's tokens.
        """
        known = self._kept.pop((grammar, letters), None)
        if known is None:
            known = self._pool.submit(self._compile, grammar, letters)
        self._kept[grammar, letters] = known
        while len(self._kept) > MAX_GRAMMARS:
            self._kept.popitem(last=False)
        return known

    @property
    def tokenizer(self) -> LLTokenizer:
        """Waits for it the first time. Raises: InvalidGrammar."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._read(), self._vocab_size)
            return self._tokenizer

    @property
    def alphabet(self) -> Alphabet:
        """Waits for it the first time. Raises: InvalidGrammar."""
        tokenizer = self.tokenizer
        with self._lock:
            self._alphabet = self._alphabet or Alphabet(tokenizer)
            return self._alphabet

    def _compile(self, grammar: str, letters: bool) -> LLMatcher:
        return compile_grammar(self.alphabet.tokenizer if letters else self.tokenizer, grammar)

    def close(self) -> None:
        """Compiles nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
