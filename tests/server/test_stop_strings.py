"""Stop strings against the plainest possible reference."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ropeway.server.stop_strings import StopAutomaton, StopMatcher

words = st.text(alphabet="ab\n", min_size=1, max_size=5)


def plain(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the match that is complete first, the longest of those; None if there is none."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(st.text(alphabet="ab\n", max_size=40), st.lists(words, min_size=1, max_size=6), st.lists(st.integers(0, 40)))
def test_any_text_cut_anywhere(text: str, stops: list[str], places: list[int]) -> None:
    """Guards the stream: however the text is cut, the same comes out, it ends before the first match, nothing of a
    stop string leaks, and nothing is held that cannot become one."""
    for include in (False, True):
        matcher = StopMatcher(StopAutomaton(stops), include)
        out, seen = "", ""
        for piece in cut(text, places):
            seen += piece
            out += matcher.feed(piece)
            if matcher.matched is not None:
                break
            held = seen[len(out) :]
            assert seen.startswith(out) and all(stop not in out for stop in stops)
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
            longest = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
            assert len(held) == longest
        match = plain(text, stops)
        if match is None:
            assert matcher.matched is None and out + matcher.finish() == text
        else:
            end, stop = match
            assert matcher.matched == stop
            assert out == (text[:end] if include else text[: end - len(stop)])
            assert len(seen) >= end, "the match was reported after a later piece"


def test_first_half_never_leaks() -> None:
    """Guards the case that everyone meets: a stop string of two tokens."""
    matcher = StopMatcher(StopAutomaton(["\n\nUser:", "###"]))
    assert [matcher.feed(piece) for piece in ("Hi", ".\n", "\nUs", "e")] == ["Hi", ".", "", ""]
    assert matcher.feed("d\n\nUser: x") == "\n\nUsed"
    assert matcher.matched == "\n\nUser:"


def test_overlapping_stops() -> None:
    """Guards failure links: a stop inside of a longer, unfinished one must be found."""
    matcher = StopMatcher(StopAutomaton(["abcd", "bc"]))
    assert matcher.feed("xabc") == "xa" and matcher.matched == "bc"


def test_many_stops_cost_what_one_costs() -> None:
    """Guards the event loop: 64 long stop strings that share their beginnings are matched in one walk per character."""
    steps = 0

    class Counting(StopAutomaton):
        def step(self, state: int, char: str) -> int:
            nonlocal steps
            steps += 1
            return super().step(state, char)

    automaton = Counting(["a" * 200 + chr(0x4E00 + i) for i in range(64)])
    steps = 0
    matcher = StopMatcher(automaton)
    for _ in range(1000):
        matcher.feed("aab")
    assert steps == 3000 and matcher.matched is None
