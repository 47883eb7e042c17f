"""The shortest end of a text that follows a grammar, from wherever the text stands. Knows bytes, no rows, no tensors.

llguidance says which bytes may follow, not how far the end is. So the grammar is compiled once more, for an alphabet
of single bytes, where a step costs microseconds, and the end is searched: what certainly ends something is taken at
once (a bracket, a quote in free text), elsewhere the few ways that differ are tried breadth first until one of them
can be ended again. The end found is one of the grammar; that no other is shorter is likely, not certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_END = 8192
"""Bytes of the longest end that is looked for."""
FREE = 64
"""Where so many bytes may follow, they are free text."""
MAX_WAYS = 24
"""Texts that the breadth-first search follows at a time."""
SPACES = frozenset(b" \t\r\n")
CLOSING = b"}],"
MAX_TRIED = 20_000
"""Bytes that one search tries, a fraction of a second."""


@dataclass(slots=True)
class Budget:
    """What one search, or several together, may cost."""

    left: int = MAX_TRIED
    """Bytes that may still be tried."""


class Alphabet:
    """A tokenizer's special tokens under their own ids, and behind all its ids one for each byte.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._model = tokenizer
        self.first = -(-tokenizer.vocab_size // 8) * 8
        """The id of byte 0; begins a byte of the masks."""
        special = [id for id in range(tokenizer.vocab_size) if tokenizer.is_special_token(id)]
        tokens = [b""] * self.first + [bytes([byte]) for byte in range(256)]
        for id in special:
            tokens[id] = tokenizer.decode_bytes([id]) or b"<special>"
        letters = _Letters(tokens, special, tokenizer.eos_token, self.first)
        self.tokenizer = LLTokenizer(TokenizerWrapper(letters), slices=[])

    def spell(self, token_id: int) -> list[int]:
        """A token of the model in this alphabet."""
        if self._model.is_special_token(token_id):
            return [token_id]
        return [self.first + byte for byte in self._model.decode_bytes([token_id])]

    def letters(self, text: bytes) -> list[int]:
        """A text in this alphabet."""
        return [self.first + byte for byte in text]

    def tokens(self, path: Sequence[int]) -> list[int]:
        """The model's tokens for something spelled."""
        ids: list[int] = []
        text = bytearray()
        for letter in path:
            if letter >= self.first:
                text.append(letter - self.first)
                continue
            ids += self._model.tokenize_bytes(bytes(text)) if text else []
            ids.append(letter)
            text.clear()
        return ids + (self._model.tokenize_bytes(bytes(text)) if text else [])

    def ends_with(self, matcher: LLMatcher, path: Sequence[int]) -> bool:
        """Whether a text may be ended by `path`; leaves the matcher where it is."""
        end = [*path, self._model.eos_token]
        return bool(matcher.validate_tokens(end) == len(end))

    def allowed(self, matcher: LLMatcher) -> tuple[list[int], Sequence[int]]:
        """The special tokens and the bytes that may follow where the text cannot end."""
        mask = matcher.compute_bitmask()
        bits = int.from_bytes(mask[: self.first // 8], "little")
        return [bits.bit_length() - 1] if bits else [], _bytes_in(mask[self.first // 8 :][:32])


@lru_cache(4096)
def _bytes_in(mask: bytes) -> tuple[int, ...]:
    bits = int.from_bytes(mask, "little")
    return tuple(byte for byte in range(256) if bits >> byte & 1)


@dataclass(slots=True, frozen=True)
class _Letters:
    """The alphabet as llguidance takes a tokenizer from Python."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    first: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        return [self.first + byte for byte in text]


def shortest_end(
    alphabet: Alphabet, matcher: LLMatcher, endings: Sequence[bytes] = (), budget: Budget | None = None
) -> list[int] | None:
    """What ends the text, in the alphabet; None if no end was found.

    Args:
        matcher: of the alphabet's tokenizer; stays where it is.
        endings: texts that may end free text.
        budget: is charged with what is tried; None for one of its own.
    """
    budget = budget or Budget()
    state = matcher.deep_copy()
    path: list[int] = []
    while not state.is_accepting():
        budget.left -= 1
        if len(path) > MAX_END or budget.left < 0:
            return None
        step = _certain(alphabet, state, endings) or _nearest_rest(alphabet, state, endings, budget)
        if not step or not state.consume_tokens(step):
            return None
        path += step
    return path


def _certain(alphabet: Alphabet, state: LLMatcher, endings: Sequence[bytes]) -> list[int]:
    """A step that ends something, or the only one there is; else nothing."""
    special, following = alphabet.allowed(state)
    if special:
        return special
    if step := _closing(alphabet, state, following, endings):
        return step
    visible = [byte for byte in following if byte not in SPACES] or following
    return [alphabet.first + visible[0]] if len(visible) == 1 else []


def _closing(alphabet: Alphabet, state: LLMatcher, following: Sequence[int], endings: Sequence[bytes]) -> list[int]:
    """A step that ends something; else nothing."""
    if len(following) < FREE:
        return next(([alphabet.first + byte] for byte in CLOSING if byte in following), [])
    for text in endings:
        ending = alphabet.letters(text)
        if state.validate_tokens(ending) == len(ending):
            after = state.deep_copy()
            after.consume_tokens(ending)
            if after.is_accepting() or len(alphabet.allowed(after)[1]) < FREE:
                return ending
    return [alphabet.first + ord('"')] if ord('"') in following else []


def _nearest_rest(alphabet: Alphabet, state: LLMatcher, endings: Sequence[bytes], budget: Budget) -> list[int]:
    """The shortest way to where the text may end, or something in it is ended; nothing if none was found."""
    ways: list[tuple[LLMatcher, list[int]]] = [(state, [])]
    while ways and budget.left > 0:
        found: dict[bytes, list[tuple[LLMatcher, list[int]]]] = {}
        for before, path in ways:
            for letter in _next_letters(alphabet, before):
                budget.left -= 1
                after = before.deep_copy()
                if not after.consume_tokens([letter]):
                    continue
                way = [*path, letter]
                special, following = alphabet.allowed(after)
                if special or after.is_accepting() or _closing(alphabet, after, following, endings):
                    return way
                # What allows the same is most likely the same; but 1 and 2 differ where at least 20 is wanted.
                same = found.setdefault(after.compute_bitmask(), [])
                same[1:] = [(after, way)]
        ways = [one for same in found.values() for one in same][:MAX_WAYS]
    return []


def _next_letters(alphabet: Alphabet, state: LLMatcher) -> list[int]:
    """Bytes to go on with: no spaces and no longer characters, unless there is nothing else."""
    following = alphabet.allowed(state)[1]
    visible = [byte for byte in following if byte not in SPACES] or following
    return [alphabet.first + byte for byte in [byte for byte in visible if byte < 128] or visible]
