"""Stop strings in a text that arrives in pieces: nothing of a stop string ever gets out, and nothing waits in vain.

The automaton is Aho and Corasick's (1975): after each character its state is the longest suffix of the text that
begins a stop string. So one walk tells both where a stop string is complete and how much text must be held back, in
time that does not depend on the number of strings. Knows characters only.
"""

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """Built once per request, shared by its choices.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail: list[int] = [0]
        self.depth: list[int] = [0]
        """State -> length of the suffix it stands for."""
        self.match: list[str | None] = [None]
        """State -> the longest stop string that the text ends with there."""
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._next[state].get(char)
            if following is None:
                following = self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = following
        self.match[state] = stop

    def _link(self) -> None:
        """Failure links, breadth first: a state's longest proper suffix that is a state too."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                if self.match[child] is None:
                    self.match[child] = self.match[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while (following := self._next[state].get(char)) is None:
            if state == 0:
                return 0
            state = self._fail[state]
        return following


class StopMatcher:
    """One choice's way through the automaton.

    The match that is complete first wins; among those that end at the same character the longest, which begins first.

    Args:
        automaton: of the request's stop strings.
        include: whether the text ends after the stop string instead of before it.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state", "matched")

    def __init__(self, automaton: StopAutomaton, include: bool = False) -> None:
        self._automaton = automaton
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, piece: str) -> str:
        """Takes the text of one token; returns what no stop string can take back. Not after a match."""
        assert self.matched is None
        text = self._held + piece
        automaton, state = self._automaton, self._state
        for place, char in enumerate(piece, start=len(self._held) + 1):
            state = automaton.step(state, char)
            stop = automaton.match[state]
            if stop is not None:
                self.matched, self._held = stop, ""
                return text[:place] if self._include else text[: place - len(stop)]
        self._state = state
        safe = len(text) - automaton.depth[state]
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text has ended: what was held back after all belongs to it."""
        held, self._held = self._held, ""
        return held
