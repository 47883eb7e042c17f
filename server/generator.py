"""From validated requests to text: the engine's rows come back as `ChoiceDelta`s.

Knows the engine client, the detokenizer and stop strings. Knows no protocol, no HTTP, no admission: an `Observer`
(the request's metrics record) is told what happens.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ropeway.server.request import ChoiceDelta, GenerationRequest

Outcome = Literal["stop", "length", "error", "disconnected", "timeout"]


class Observer(Protocol):
    """Who wants to know how a request goes; `RequestRecord` of the metrics is one."""

    def observe(self, delta: ChoiceDelta) -> None:
        """Called once per wake-up and choice."""

    def finish(self, outcome: Outcome | None = None) -> None:
        """Called once, when the generation is closed; None if every choice ended by itself."""


@dataclass(slots=True)
class Usage:
    """Tokens, so far. A prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Generation:
    """What `Generator.start` gives: iterate it to the end or close it. Not restartable, one consumer.

    Iteration yields one list per wake-up: everything that came since the last one, one `ChoiceDelta` per choice.
    Nothing is pulled from the engine's stream while nobody asks, so a slow reader's deltas coalesce.
    Raises ApiError: 500 `engine_error`, 503 `engine_restarting`, 504 `deadline_exceeded`.
    """

    usage: Usage

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        raise NotImplementedError

    async def __anext__(self) -> list[ChoiceDelta]:
        raise NotImplementedError

    def close(self, outcome: Outcome | None = None) -> None:
        """Aborts in the engine whatever is unfinished and tells the observer. Idempotent: the first call counts."""


class Generator:
    """Makes generations. `Generator(client, tokenizer)`; one per API worker."""

    def start(self, requests: list[GenerationRequest], observer: Observer) -> Generation:
        """Submits every prompt. Choices are numbered through: request i starts at its `first_index`."""
        raise NotImplementedError
