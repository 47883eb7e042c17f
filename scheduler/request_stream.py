"""RequestStream: the tokens of one request, on their way from the engine to whoever answers it. asyncio, no sockets.

It remembers every token it got, so that another engine can go on where a dead one stopped. Nothing waits for a slow
reader: what the consumer has not taken yet is merged into one `RowOutput` per choice, so a request never holds more
than its own tokens.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable

import msgspec

from ropeway.scheduler.messages import AddRequest, ChoiceStart, RowOutput

FORGIVEN_TOKENS = 32
"""Tokens of one choice after which a request did not kill the last engine. Fewer would let a request that kills again
after its first tokens take engines until the restart budget ends the server."""


class EngineError(Exception):
    """Something about the engine that a client has to know; `code` is stable, the message one sentence."""

    code = "engine_error"


class Quarantined(EngineError):
    """The request was present at two engine deaths and did not get far between them: it is not tried again."""

    code = "quarantined"


class EngineFailed(EngineError):
    """The engine died and will not come back."""

    code = "engine_failed"


class RequestStream:
    """The tokens of one request, all its choices. Made by `EngineClient.submit`; one consumer.

    Iteration wakes up at most once per step and yields what came since the last time, at most one `RowOutput` per
    choice. It ends when every choice ended. Raises Quarantined or EngineFailed, after the last tokens.
    """

    def __init__(self, request: AddRequest, forget: Callable[["RequestStream", int | None], None]) -> None:
        """`forget(stream, choice)` is called when the consumer wants no more of a choice, or of any (None)."""
        self.request_id = request.request_id
        self.arrival = request.arrival
        self.deadline = request.deadline
        self._forget = forget
        self._request = request
        self._emitted: dict[int, list[int]] = {start.index: [] for start in request.choices}
        self._num_scored = 1  # the prompt's first token has no logprob
        self._open = set(self._emitted)
        self._pending: dict[int, RowOutput] = {}
        self._error: EngineError | None = None
        self._wake = asyncio.Event()
        self._listener: Callable[[], None] = _nobody
        self._since_death: Counter[int] = Counter()  # tokens of each choice
        self.deaths = 0
        """Engines that died with it; none again once a choice got `FORGIVEN_TOKENS` from the next engine."""

    def __aiter__(self) -> AsyncIterator[list[RowOutput]]:
        return self

    async def __anext__(self) -> list[RowOutput]:
        while not (outputs := self.poll()):
            if outputs is None:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return outputs

    def poll(self) -> list[RowOutput] | None:
        """What came since the last time; empty if nothing did, None if nothing more will come.

        For who listens instead of waiting. Raises Quarantined or EngineFailed, after the last tokens.
        """
        if self._pending:
            outputs = list(self._pending.values())
            self._pending.clear()
            return outputs
        if self._error:
            raise self._error
        return [] if self._open else None

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener`, which must not raise, is called whenever there may be news: at most once per engine's message."""
        self._listener = listener

    def abort(self, choice: int | None = None) -> None:
        """Ends one choice, or all; nothing more comes of it. Idempotent, also after the end."""
        ended = self._open if choice is None else self._open & {choice}
        if not ended:
            return
        self._open = self._open - ended
        for index in ended:
            self._pending.pop(index, None)
        self._wake.set()  # the listener is who aborts
        self._forget(self, choice if self._open else None)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def take(self, output: RowOutput) -> None:
        """One step's output of one choice. Called by the client, which calls `wake` when all choices have theirs."""
        index = output.choice
        if index not in self._open:
            return  # crossed our abort
        emitted = self._emitted[index]
        if emitted and output.cached_tokens is not None:
            output.cached_tokens = None  # of the restarted engine, which knows more of the prompt than the first did
        emitted += output.token_ids
        self._num_scored += len(output.scored)
        self._since_death[index] += len(output.token_ids)
        if self._since_death[index] >= FORGIVEN_TOKENS:
            self.deaths = 0
        if output.finish_reason:
            self._open.discard(index)
        waiting = self._pending.get(index)
        self._pending[index] = merge(waiting, output) if waiting else output

    def wake(self) -> None:
        """There is news for the consumer. Called by the client."""
        self._wake.set()
        self._listener()

    def expire(self) -> None:
        """Its deadline has passed, and no engine is there to say so. Called by the client."""
        for index in sorted(self._open):
            error = f"The request's deadline passed after {len(self._emitted[index])} tokens."
            self.take(RowOutput(self.request_id, index, finish_reason="timeout", error=error))
        self.wake()

    def lose_engine(self) -> None:
        """An engine died with it. Called by the client."""
        self.deaths += 1
        self._since_death.clear()

    def fail(self, error: EngineError) -> None:
        """Ends the stream with an error. Called by the client."""
        self._open = set()
        self._error = error
        self.wake()

    def resume_request(self, generation: int) -> AddRequest:
        """What asks this generation of the engine for the rest. Called by the client."""
        starts = [ChoiceStart(index, self._emitted[index]) for index in sorted(self._open)]
        return msgspec.structs.replace(
            self._request, generation=generation, choices=starts, num_scored=self._num_scored
        )


def _nobody() -> None:
    """Listens to nothing."""


def merge(first: RowOutput, second: RowOutput) -> RowOutput:
    """Two outputs of one choice, in order, as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return RowOutput(
        request_id=first.request_id,
        choice=first.choice,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        stop_reason=second.stop_reason,
        cached_tokens=first.cached_tokens if first.cached_tokens is not None else second.cached_tokens,
        error=second.error,
        scored=first.scored + second.scored,
        score=second.score,
    )
