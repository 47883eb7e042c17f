"""A row's answer is complete within its `max_tokens`: at every token an end is known that fits into what is left.

    the first token of the known end    may always come: one token less is needed, one token less is left
    any other token                     may come if behind it, too, an end is known that fits

So no token is allowed behind which nobody knows an end, and the end that is known at the start is enough for all of
them. Only the likeliest tokens of the others are looked at. The end known is a function of the tokens so far: each one
follows from the one before, so that a row that is added again after a crash finds the same. Knows ids; no masks.
"""

from collections.abc import Sequence

from llguidance import LLMatcher

from ropeway.scheduler.shortest_end import Alphabet, Budget, shortest_end

LIKELIEST = 64
"""Tokens that are looked at, at each step."""
STEP_LETTERS = 5_000
"""Letters of the known end that may be read again for them, all together: fewer tokens where the end is long."""
MAX_SEARCHES = 8
"""Of them, those for which an end is searched where the known one does not do."""
STEP_TRIED = 1_000
"""Bytes that these searches may try together: all rows wait for them, some 15 ms and more where bytes are dear."""
FIRST_TRIED = 200_000
"""Bytes that the search for the first end may try; it is made once per request, before the engine hears of it."""
CONTINUATION = range(0x80, 0xC0)
"""Bytes of a character behind its first."""

End = tuple[list[int], list[int]]
"""Its letters and its tokens."""


class NoEnd(Exception):
    """No text of the grammar was found, or none that ends what is there."""


class Closing:
    """One row's text, and its known end.

    Args:
        start: the grammar, compiled for the alphabet; it is copied.
        endings: texts that may end free text.
        path: a text of the grammar, in the alphabet, where one is known; else it is searched.

    Raises: NoEnd.
    """

    def __init__(
        self, alphabet: Alphabet, start: LLMatcher, endings: Sequence[str], path: list[int] | None = None
    ) -> None:
        self._alphabet = alphabet
        self._state = start.deep_copy()
        self._endings = [text.encode() for text in endings]
        found = shortest_end(alphabet, self._state, self._endings, Budget(FIRST_TRIED)) if path is None else path
        if found is None:
            raise NoEnd("no text of it was found that could be completed")
        self.path = found
        """Letters of the known end."""
        self.end = alphabet.tokens(found)
        """Its tokens; none where the text may end as it is."""

    def take(self, token_id: int, left: int) -> None:
        """The row's next token, behind which `left` more may come. Raises: NoEnd."""
        found = self._end_behind(token_id, left)
        if found is None or not self._state.consume_tokens(self._alphabet.spell(token_id)):
            raise NoEnd("nothing was found that ends the text")
        self.path, self.end = found

    def fitting(self, token_ids: Sequence[int], left: int) -> list[int]:
        """Those of the tokens behind which an end is known that takes at most `left` tokens."""
        fitting, searches, budget = [], MAX_SEARCHES, Budget(STEP_TRIED)
        for token_id in token_ids[: max(STEP_LETTERS // (len(self.path) + 1), 1)]:
            found = self._known_end(token_id, left)
            if found is None and searches:
                searches -= 1
                found = self._end_behind(token_id, left, budget)
            if found is not None:
                fitting.append(token_id)
        return fitting

    def _end_behind(self, token_id: int, left: int, budget: Budget | None = None) -> End | None:
        """An end behind a token that fits: of the one known, else one that is searched."""
        if (known := self._known_end(token_id, left)) is not None:
            return known
        after = self._state.deep_copy()
        if not after.consume_tokens(self._alphabet.spell(token_id)):
            return None
        path = shortest_end(self._alphabet, after, self._endings, budget)
        return None if path is None else self._fits(path, left)

    def _known_end(self, token_id: int, left: int) -> End | None:
        """What is left of the known end behind a token, or all of it, if that ends the text and fits."""
        spelled = self._alphabet.spell(token_id)
        if self.end and self.end[0] == token_id:
            return (self.path[len(spelled) :], self.end[1:]) if len(self.end) - 1 <= left else None
        # It may spell the known end, stand for as many characters of it, or be something that needs no other end.
        characters = sum(letter - self._alphabet.first not in CONTINUATION for letter in spelled)
        for length in dict.fromkeys((len(spelled), characters, 0)):
            path = self.path[length:]
            if self._alphabet.ends_with(self._state, spelled + path) and (found := self._fits(path, left)):
                return found
        return None

    def _fits(self, path: list[int], left: int) -> End | None:
        tokens = self._alphabet.tokens(path)
        return (path, tokens) if len(tokens) <= left else None
