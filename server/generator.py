"""From validated requests to text: the engine's rows come back as `ChoiceDelta`s.

Knows the engine client, the detokenizer and stop strings. Knows no protocol, no HTTP, no admission: an `Observer`
(the request's metrics record) is told what happens.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.client import EngineError
from ropeway.scheduler.messages import EditSpec, RowOutput
from ropeway.server.detokenizer import Detokenizer
from ropeway.server.engine_errors import api_error, engine_failure, row_error
from ropeway.server.errors import ApiError
from ropeway.server.request import ChoiceDelta, GenerationRequest
from ropeway.server.stop_strings import StopAutomaton, StopMatcher
from ropeway.server.token_positions import Positions, PromptPositions
from ropeway.server.tokenizer import TextTokenizer

Outcome = Literal["stop", "length", "error", "disconnected", "timeout", "rejected"]

OUTCOMES: dict[int, Outcome] = {400: "rejected", 504: "timeout"}
"""Of failures, by status; any other is an error."""
OUT_OF_TIME = "max_time"
TIME_CRITERION = "MaxTimeCriteria"
"""What ends a beam search whose `max_time` is over; see `processing.py`."""


class Observer(Protocol):
    """Who wants to know how a request goes; `RequestRecord` of the metrics is one."""

    def observe(self, delta: ChoiceDelta) -> None:
        """Called once per wake-up and choice."""

    def finish(self, outcome: Outcome | None = None) -> None:
        """Called once, when the generation is closed; None if every choice ended by itself."""


class Rows(Protocol):
    """The tokens of one submitted request; `scheduler.client.RequestStream` is one."""

    def poll(self) -> list[RowOutput] | None: ...

    def listen(self, listener: Callable[[], None]) -> None: ...

    def abort(self, choice: int | None = None) -> None: ...


class Engine(Protocol):
    """Takes requests; `scheduler.client.EngineClient` is one."""

    def submit(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        max_tokens: int,
        n: int = 1,
        *,
        key_id: str = "",
        cache_salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        edits: Sequence[EditSpec] = (),
    ) -> Rows: ...


@dataclass(slots=True)
class Usage:
    """Tokens, so far. A prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion's: thoughts and their markers. Filled by a protocol that parses them."""


class _Choice:
    """One row's text: what was generated, what of it may go out, how it ended."""

    __slots__ = (
        *("_detokenizer", "_matcher", "_positions", "_request", "_tokenizer", "_tokens"),
        *("finished", "index", "length"),
    )

    def __init__(
        self, index: int, request: GenerationRequest, tokenizer: TextTokenizer, automaton: StopAutomaton | None
    ) -> None:
        self.index = index
        self._request = request
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer, request.prompt_ids, request.skip_special_tokens, request.kept_special_ids
        )
        self._matcher = StopMatcher(automaton, request.include_stop_str_in_output) if automaton else None
        self._positions = Positions(request, tokenizer)
        self._tokens = 0
        self.length = 0
        """Characters of text so far, those held back included."""
        self.finished = False

    def take(self, row: RowOutput, delta: ChoiceDelta) -> None:
        """Adds a row's tokens to `delta`, up to the one that completes a stop string.

        A stop token is counted and has its logprobs, but its text is no part of the answer unless asked for.
        """
        if not self._request.max_tokens:  # the engine always generates one
            self.finished, delta.finish_reason = True, "length"
            return
        delta.score = row.score
        last = len(row.token_ids) - 1
        for place, token_id in enumerate(row.token_ids):
            self._tokens += 1
            delta.token_ids.append(token_id)
            if row.logprobs is not None:
                delta.logprobs.append(self._positions.position(token_id, row.logprobs[place], self.length))
            ends = place == last and row.stop_token_id is not None
            if ends and not self._request.include_stop_str_in_output:
                break
            if self._add(self._detokenizer.step(token_id), delta):
                return
        if row.finish_reason is not None and not self._add(self._detokenizer.finish(), delta):
            self._end(row, delta)

    @property
    def begun(self) -> bool:
        """Whether it has a token."""
        return self._tokens > 0

    def cut(self, delta: ChoiceDelta) -> bool:
        """Ends the choice because its time is over, if it has a token; True if that was so."""
        if self.finished or not self._tokens:
            return False
        if not self._add(self._detokenizer.finish(), delta):
            self._release(delta)
            delta.finish_reason, delta.stop_reason = "length", OUT_OF_TIME
        return True

    def _release(self, delta: ChoiceDelta) -> None:
        """What was held back after all belongs to the text."""
        if self._matcher is not None:
            delta.text += self._matcher.finish()
        self.finished = True

    def _add(self, piece: str, delta: ChoiceDelta) -> bool:
        """Passes a token's text on; True if a stop string ended the choice. None does before `min_tokens`."""
        self.length += len(piece)
        matcher = self._matcher
        if matcher is None or self._tokens <= self._request.sampling.min_tokens:
            delta.text += piece
            return False
        delta.text += matcher.feed(piece)
        if matcher.matched is None:
            return False
        self.finished = True
        delta.finish_reason, delta.stop_reason = "stop", matcher.matched
        return True

    def _end(self, row: RowOutput, delta: ChoiceDelta) -> None:
        """The engine ended the row."""
        self._release(delta)
        if row.stop_reason == TIME_CRITERION and self._request.max_time is not None:  # a search, which has no text yet
            delta.finish_reason, delta.stop_reason = "length", OUT_OF_TIME
            return
        delta.finish_reason = "stop" if row.finish_reason == "stop" else "length"
        if row.stop_token_id is not None and row.stop_token_id not in self._tokenizer.eos_token_ids:
            delta.stop_reason = row.stop_token_id
        elif row.stop_reason:
            delta.stop_reason = row.stop_reason


class _Prompt:
    """One submitted request and its choices."""

    __slots__ = ("choices", "late", "request", "rows", "scored", "unfinished")

    def __init__(
        self, request: GenerationRequest, rows: Rows, tokenizer: TextTokenizer, automaton: StopAutomaton | None
    ) -> None:
        self.request = request
        self.rows = rows
        self.choices = [_Choice(request.first_index + i, request, tokenizer, automaton) for i in range(request.n)]
        self.scored = PromptPositions(request, tokenizer)
        self.unfinished = request.n
        self.late = False
        """Whether `max_time` is over."""


class Generation:
    """What `Generator.start` gives: take from it to the end, then close it. Not restartable, one consumer.

    Iteration yields one list per wake-up: everything that came since the last one, one `ChoiceDelta` per choice. Who
    cannot wait calls `take` when `listen` says so. Nothing is taken from the engine's stream while nobody asks, so a
    slow reader's deltas coalesce. Raises ApiError: 500 `engine_error`, 503 `draining`, 504 `deadline_exceeded`.
    """

    def __init__(self, prompts: list[_Prompt], observer: Observer) -> None:
        self.usage = Usage(prompt_tokens=sum(len(prompt.request.prompt_ids) for prompt in prompts))
        self._prompts = prompts
        self._observer = observer
        self._news = asyncio.Event()
        self._listener = self._news.set
        self._failure: ApiError | None = None
        self._closed = False
        for prompt in prompts:
            prompt.rows.listen(self._on_news)
        self._timers = [
            asyncio.get_running_loop().call_later(prompt.request.max_time, self._on_late, prompt)
            for prompt in prompts
            if prompt.request.max_time is not None
        ]

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        while not (deltas := self.take()):
            if self._failure is not None:
                raise self._failure
            if self.over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return deltas

    @property
    def over(self) -> bool:
        """Whether every choice has ended, or the generation has failed: iteration has nothing more to wait for."""
        return self._failure is not None or not any(prompt.unfinished for prompt in self._prompts)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """`listener`, which must not raise, is called when there may be something to take; None: iteration is woken."""
        self._listener = listener or self._news.set

    def _on_news(self) -> None:
        self._listener()

    def _on_late(self, prompt: _Prompt) -> None:
        prompt.late = True
        self._listener()

    def take(self) -> list[ChoiceDelta]:
        """What came for any prompt; empty if nothing did. A failure is kept for after the deltas."""
        if self._failure is not None:
            return []
        deltas: dict[int, ChoiceDelta] = {}
        for prompt in self._prompts:
            if prompt.unfinished:
                self._update(prompt, self._poll(prompt), deltas)
                if prompt.late:
                    self._cut(prompt, deltas)
        taken = list(deltas.values())
        for delta in taken:
            self.usage.completion_tokens += len(delta.token_ids)
            self._observer.observe(delta)
        return taken

    def _poll(self, prompt: _Prompt) -> list[RowOutput]:
        try:
            rows = prompt.rows.poll()
        except EngineError as error:
            self._failure = api_error(error)
            return []
        if rows is None:
            self._failure = engine_failure("The engine ended the request early.")
            return []
        return rows

    def _update(self, prompt: _Prompt, rows: list[RowOutput], deltas: dict[int, ChoiceDelta]) -> None:
        """Rows to deltas, by choice. A choice that a stop string ended is aborted at once."""
        for row in rows:
            choice = prompt.choices[row.choice]
            if choice.finished:
                continue  # computed after the stop string
            if row.finish_reason in ("error", "refused", "timeout", "abort"):
                self._failure = row_error(row)
                if not row.token_ids:
                    continue
                row = msgspec.structs.replace(row, finish_reason=None)
            prompt.scored.take(row.scored)
            if not row.token_ids and row.finish_reason is None:
                continue  # more of the prompt's logprobs; all of them go out with the first token
            delta = deltas.get(choice.index)
            if delta is None:
                delta = deltas[choice.index] = ChoiceDelta(choice.index)
            if not choice.begun:
                delta.prompt_logprobs = prompt.scored.positions
            choice.take(row, delta)
            if row.cached_tokens:
                delta.cached_tokens += row.cached_tokens
                self.usage.cached_tokens += row.cached_tokens if row.choice == 0 else 0
            if choice.finished:
                prompt.unfinished -= 1
                if row.finish_reason is None:
                    prompt.rows.abort(row.choice)

    def _cut(self, prompt: _Prompt, deltas: dict[int, ChoiceDelta]) -> None:
        """Ends the choices of a prompt whose time is over; a choice without a token waits for its first, as in
        transformers."""
        for place, choice in enumerate(prompt.choices):
            delta = deltas.get(choice.index) or ChoiceDelta(choice.index)
            if choice.cut(delta):
                deltas[choice.index] = delta
                prompt.unfinished -= 1
                prompt.rows.abort(place)

    def close(self, outcome: Outcome | None = None) -> None:
        """Aborts in the engine whatever is unfinished and tells the observer. Idempotent: the first call counts."""
        if self._closed:
            return
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        for prompt in self._prompts:
            if prompt.unfinished:
                prompt.rows.abort()
        if self._failure is not None:
            outcome = OUTCOMES.get(self._failure.status, "error")
        self._observer.finish(outcome)


class Generator:
    """Makes generations; one per API worker.

    Args:
        engine: takes the requests.
        tokenizer: gives bytes per id.
    """

    def __init__(self, engine: Engine, tokenizer: TextTokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def start(self, requests: Sequence[GenerationRequest], observer: Observer) -> Generation:
        """Submits every prompt. Choices are numbered through: request i starts at its `first_index`.

        Raises: ApiError 503 if the engine takes nothing now; what was submitted before is aborted.
        """
        prompts: list[_Prompt] = []
        automata = {stop: StopAutomaton(stop) for stop in {request.stop: None for request in requests} if stop}
        try:
            for request in requests:
                rows = self._engine.submit(
                    request.prompt_ids,
                    request.sampling,
                    max(request.max_tokens, 1),
                    request.n,
                    key_id=request.key_id,
                    cache_salt=request.cache_salt,
                    priority=request.priority,
                    deadline=request.deadline,
                    edits=request.edits,
                )
                prompts.append(_Prompt(request, rows, self._tokenizer, automata.get(request.stop)))
        except EngineError as error:
            for prompt in prompts:
                prompt.rows.abort()
            raise api_error(error) from None
        return Generation(prompts, observer)


async def collect(generation: Generation) -> list[ChoiceDelta]:
    """Everything, one delta per choice, in order of their indexes."""
    whole: dict[int, ChoiceDelta] = {}
    texts: dict[int, list[str]] = {}
    async for deltas in generation:
        for delta in deltas:
            choice = whole.setdefault(delta.index, ChoiceDelta(delta.index))
            texts.setdefault(delta.index, []).append(delta.text)
            choice.token_ids += delta.token_ids
            choice.logprobs += delta.logprobs
            choice.prompt_logprobs += delta.prompt_logprobs
            choice.cached_tokens += delta.cached_tokens
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.score = delta.score
    for index, choice in whole.items():
        choice.text = "".join(texts[index])
    return [whole[index] for index in sorted(whole)]
