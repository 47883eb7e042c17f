"""Requests, clients and mishaps by the hundred, drawn or written; played against the real scheduler and engine.

`check(scenario)` plays one; every choice must get the tokens that it would get alone.
"""

from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

from fake_runner import VOCAB, FakeRunner, next_token, score
from hypothesis import strategies as st

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import AbortRequest, AddRequest, ChoiceStart, RowOutput
from ropeway.scheduler.scheduler import Scheduler

OWNERS = 2
Choice = tuple[int, int]
"""(request id, choice)"""


@dataclass(frozen=True)
class Arrival:
    """A request and what its client does. Times are step numbers."""

    at: int
    request: AddRequest
    aborts: tuple[tuple[int, int | None], ...] = ()
    """(time, choice or None)"""
    host_rows: bool = False
    """Whether its rows must be read before they go on (`max_in_flight` 0)."""

    @property
    def owner(self) -> int:
        return self.request.request_id % OWNERS


@dataclass(frozen=True)
class Scenario:
    arrivals: tuple[Arrival, ...]
    lag: Literal[0, 1] = 0
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 8
    max_model_len: int = 40
    num_blocks: int = 40
    block_size: int = 4
    caching: bool = True
    scope: Literal["key", "server"] = "key"
    broken: frozenset[tuple[int, int]] = frozenset()
    crash_at: int | None = None
    """The engine dies with all it knows; the workers send again what was not finished."""
    max_scored_tokens: int = 8
    worker_dies_at: int | None = None
    """Worker 0 and its requests are gone."""


@dataclass
class Result:
    """What a choice's client saw."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    aborted: bool = False


def alone(arrival: Arrival, index: int, scenario: Scenario) -> Result:
    """The reference: one choice by itself, without engine, blocks, chunks or neighbours."""
    request = arrival.request
    seed = (request.sampling.seed + index + 2**63) % 2**64 - 2**63
    params = replace(request.sampling, seed=seed)
    result = Result()
    limit = min(len(request.prompt_ids) + request.max_tokens, scenario.max_model_len)
    too_long = -(-(limit - 1) // scenario.block_size) > scenario.num_blocks - 1
    if too_long or len(request.prompt_ids) >= scenario.max_model_len:
        return Result(finish_reason="error")
    while result.finish_reason is None:
        context = request.prompt_ids + result.tokens
        if (seed, len(context)) in scenario.broken:
            result.finish_reason = "error"
            break
        token = next_token(context, len(result.tokens), params)
        result.tokens.append(token)
        if params.logprobs is not None:
            result.logprobs.append(-float(len(context)))
        if token in params.stop_token_ids and len(result.tokens) > params.min_tokens:
            result.finish_reason, result.stop_token_id = "stop", token
        elif len(context) + 1 == limit:
            result.finish_reason = "length"
    return result


class Run:
    """Plays a scenario and checks what must hold after every step."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.results: dict[Choice, Result] = {
            (arrival.request.request_id, choice.index): Result()
            for arrival in scenario.arrivals
            for choice in arrival.request.choices
        }
        self.scored: dict[int, list[float]] = {arrival.request.request_id: [] for arrival in scenario.arrivals}
        """By request: what came of its prompt's logprobs."""
        self.prompts = {
            arrival.request.request_id: arrival.request.prompt_ids
            for arrival in scenario.arrivals
            if arrival.request.sampling.prompt_logprobs is not None
        }
        self.preemptions = 0
        self.forks = 0
        self.start_engine()

    def start_engine(self) -> None:
        scenario = self.scenario
        self.pool = BlockPool(scenario.num_blocks, scenario.block_size, caching=scenario.caching)
        limits = Limits(
            scenario.max_num_seqs,
            scenario.max_num_batched_tokens,
            scenario.max_model_len,
            scenario.scope,
            scenario.max_scored_tokens,
        )
        self.scheduler = Scheduler(limits, self.pool)
        self.runner = FakeRunner(scenario.num_blocks, scenario.block_size, scenario.broken, self.pool.is_published)
        self.engine = Engine(self.scheduler, self.runner, scenario.lag, count(0.0, 0.01).__next__)

    def play(self) -> None:
        events = [arrival.at for arrival in self.scenario.arrivals]
        events += [at for arrival in self.scenario.arrivals for at, _ in arrival.aborts]
        events += [self.scenario.crash_at or 0, self.scenario.worker_dies_at or 0]
        now = 0
        while now <= max(events) or self.engine.has_work:
            self.clients_act(now)
            self.step(now)
            now += 1
            assert now < 3000, "the engine does not come to an end"
        assert self.pool.usage == 0 and self.scheduler.num_unfinished == 0
        assert len(self.scheduler.places.free_slots) == self.scenario.max_num_seqs
        assert all(flight.was_read for flight in self.runner.flights)
        self.preemptions += self.scheduler.stats.preemptions

    def clients_act(self, now: int) -> None:
        for arrival in self.scenario.arrivals:
            if arrival.at == now:
                self.arrive(arrival, now)
        if now == self.scenario.crash_at:
            self.crash(now)
        for arrival in self.scenario.arrivals:
            for at, choice in arrival.aborts:
                if at == now:
                    self.abort(arrival, choice)
        if now == self.scenario.worker_dies_at:
            held = self.held()
            self.engine.abort_owner(0)
            assert not any(request_id % OWNERS == 0 for request_id, _ in self.held())
            self.mark_aborted(held)

    def mark_aborted(self, held: set[Choice]) -> None:
        """What was held before an abort and is not any more."""
        for choice in held - self.held():
            self.results[choice].aborted = True

    def held(self) -> set[Choice]:
        return {(row.request_id, row.choice) for row in self.rows()}

    def arrive(self, arrival: Arrival, now: int) -> None:
        if not self.worker_is_dead(arrival, now):
            self.add(arrival, arrival.request)
            return
        for choice in arrival.request.choices:
            self.results[arrival.request.request_id, choice.index].aborted = True

    def worker_is_dead(self, arrival: Arrival, now: int) -> bool:
        dies_at = self.scenario.worker_dies_at
        return arrival.owner == 0 and dies_at is not None and now > dies_at

    def rows(self) -> list:
        return [*self.scheduler.waiting, *self.scheduler.running]

    def add(self, arrival: Arrival, request: AddRequest) -> None:
        self.engine.add(arrival.owner, request)
        for row in self.rows():
            if row.request_id == request.request_id and arrival.host_rows:
                row.max_in_flight = 0

    def abort(self, arrival: Arrival, choice: int | None) -> None:
        request_id = arrival.request.request_id
        held = self.held()
        self.engine.abort(1 - arrival.owner, AbortRequest(1, request_id))
        assert self.held() == held, "only the owner can abort"
        self.engine.abort(arrival.owner, AbortRequest(1, request_id, choice))
        targets = {(request_id, one.index) for one in arrival.request.choices if choice in (None, one.index)}
        assert self.held() == held - targets
        self.mark_aborted(held)

    def crash(self, now: int) -> None:
        self.preemptions += self.scheduler.stats.preemptions
        self.start_engine()
        for arrival in self.scenario.arrivals:
            starts = [
                ChoiceStart(choice.index, self.results[arrival.request.request_id, choice.index].tokens.copy())
                for choice in arrival.request.choices
                if self.is_open(arrival, choice.index)
            ]
            if arrival.at <= now and starts and not self.worker_is_dead(arrival, now):
                fields = {name: getattr(arrival.request, name) for name in AddRequest.__struct_fields__}
                scored = 1 + len(self.scored[arrival.request.request_id])
                self.add(arrival, AddRequest(**{**fields, "choices": starts, "num_scored": scored}))

    def is_open(self, arrival: Arrival, index: int) -> bool:
        result = self.results[arrival.request.request_id, index]
        return not result.aborted and result.finish_reason is None

    def step(self, now: int) -> None:
        launched = len(self.runner.steps)
        outputs = self.engine.step(float(now))
        if len(self.runner.steps) > launched:
            step = self.runner.steps[-1]
            self.forks += len(step.copies)
            assert len(step.rows) <= self.scenario.max_num_seqs
            assert sum(len(row.token_ids) for row in step.rows) <= self.scenario.max_num_batched_tokens
            assert sum(len(one.targets) for one in step.scores.values()) <= self.scenario.max_scored_tokens
        assert sum(not flight.was_read for flight in self.runner.flights) <= self.scenario.lag
        self.scheduler.check_integrity()
        self.check_index()
        assert not any(self.results[choice].aborted for choice in self.held())
        for owner, rows in outputs.items():
            for output in rows:
                assert output.request_id % OWNERS == owner
                self.receive(output)

    def has_scores(self, request_id: int) -> bool:
        """Whether all of its prompt's logprobs have come. One of its choices may be gone that was to bring them."""
        prompt = self.prompts.get(request_id, [0])
        expected = [score(prompt[:place], prompt[place]) for place in range(1, len(prompt))]
        scored = self.scored[request_id]
        assert scored == expected[: len(scored)]
        return scored == expected or self.results[request_id, 0].aborted

    def check_index(self) -> None:
        """Whatever can be found holds what its digest says."""
        for row in self.scheduler.running:
            blocks = self.pool.find(row.block_hashes)
            size = self.pool.block_size
            for index, block in enumerate(blocks):
                assert self.runner.pool[block] == row.tokens[index * size : (index + 1) * size]

    def receive(self, output: RowOutput) -> None:
        result = self.results[output.request_id, output.choice]
        assert not result.aborted, "output after an abort"
        assert result.finish_reason is None, "output after the end"
        assert output.token_ids or output.finish_reason or output.scored
        self.scored[output.request_id] += [one.logprob for one in output.scored]
        assert not output.token_ids or self.has_scores(output.request_id), "a token came before its prompt's logprobs"
        assert (output.error is not None) == (output.finish_reason in ("error", "timeout"))
        result.tokens += output.token_ids
        result.logprobs += [one.logprob for one in output.logprobs or []]
        result.finish_reason = output.finish_reason
        result.stop_token_id = output.stop_token_id


def check(scenario: Scenario) -> Run:
    """Plays the scenario; every choice must have what it gets alone, or the beginning of it if it was cut short."""
    run = Run(scenario)
    run.play()
    for arrival in scenario.arrivals:
        for choice in arrival.request.choices:
            expected = alone(arrival, choice.index, scenario)
            result = run.results[arrival.request.request_id, choice.index]
            if result.aborted or result.finish_reason == "timeout":
                assert result.aborted or arrival.request.deadline is not None
                assert result.tokens == expected.tokens[: len(result.tokens)]
                assert result.logprobs == expected.logprobs[: len(result.logprobs)]
            else:
                assert result == expected
    return run


def request(
    request_id: int,
    prompt: list[int],
    max_tokens: int = 5,
    n: int = 1,
    **fields: object,
) -> AddRequest:
    own = {name: fields.pop(name) for name in list(fields) if name in AddRequest.__struct_fields__}
    sampling = SamplingParams(**{"seed": 1000 * request_id, **fields})
    return AddRequest(
        **{
            "generation": 1,
            "request_id": request_id,
            "prompt_ids": prompt,
            "sampling": sampling,
            "max_tokens": max_tokens,
            "choices": [ChoiceStart(index) for index in range(n)],
            "arrival": float(request_id),
            **own,
        }
    )


PREFIXES = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 2, 3, 4, 9, 9, 9, 9, 9]]


@st.composite
def arrivals(draw: st.DrawFn, request_id: int) -> Arrival:
    prefix = draw(st.sampled_from(PREFIXES))
    prompt = prefix[: draw(st.integers(0, len(prefix)))] + draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))
    at = draw(st.integers(0, 12))
    n = draw(st.sampled_from([1, 1, 2, 3, 4]))
    deadline = draw(st.none() | st.none() | st.integers(at, at + 40).map(float))
    when = st.integers(at, at + 25)
    aborts = draw(st.just(()) | st.tuples(st.tuples(when, st.none() | st.integers(0, n - 1))))
    return Arrival(
        at=at,
        request=request(
            request_id,
            prompt or [7],
            draw(st.integers(1, 16)),
            n,
            temperature=draw(st.sampled_from([0.0, 1.0])),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))),
            min_tokens=draw(st.sampled_from([0, 0, 3])),
            logprobs=draw(st.sampled_from([None, 0])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
            seed=draw(st.just(1000 * request_id) | st.just(2**63 - 2)),
            priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
            arrival=float(at),
            deadline=deadline,
            key_id=draw(st.sampled_from(["", "a"])),
            cache_salt=draw(st.sampled_from(["", "", "s"])),
        ),
        aborts=aborts,
        host_rows=draw(st.sampled_from([False, False, False, True])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    count = draw(st.integers(1, 6))
    drawn = tuple(draw(arrivals(request_id)) for request_id in range(count))
    block_size = draw(st.integers(1, 5))
    longest = max(len(one.request.prompt_ids) + one.request.max_tokens for one in drawn)
    # From "one request is too long" over "each fits, but not with others" to "all fit".
    spare = draw(st.integers(-1, 8) | st.integers(1, 4) | st.just(150))
    return Scenario(
        arrivals=drawn,
        lag=draw(st.sampled_from([0, 1])),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
        max_model_len=draw(st.integers(10, 40) | st.just(40)),
        num_blocks=max(2, longest // block_size + spare),
        block_size=block_size,
        caching=draw(st.booleans()),
        scope=draw(st.sampled_from(["key", "server"])),
        broken=draw(
            st.frozensets(st.tuples(st.integers(0, count).map(lambda i: 1000 * i), st.integers(1, 25)), max_size=3)
        ),
        max_scored_tokens=draw(st.integers(1, 10)),
        crash_at=draw(st.none() | st.none() | st.integers(1, 20)),
        worker_dies_at=draw(st.none() | st.none() | st.integers(1, 20)),
    )


@st.composite
def crowds(draw: st.DrawFn) -> Scenario:
    """Many rows that grow long in little memory."""
    count = draw(st.integers(3, 6))
    times = [draw(st.integers(0, 4)) for _ in range(count)]
    priorities = [draw(st.sampled_from([0, 0, 1])) for _ in range(count)]
    tokens = [draw(st.integers(6, 20)) for _ in range(count)]
    n = [draw(st.sampled_from([1, 1, 2])) for _ in range(count)]
    scores = [draw(st.sampled_from([None, None, 0])) for _ in range(count)]
    block_size = draw(st.integers(1, 3))
    return Scenario(
        arrivals=tuple(
            Arrival(
                times[i],
                request(
                    i,
                    PREFIXES[i % 2][: 3 + i],
                    tokens[i],
                    n[i],
                    arrival=float(times[i]),
                    priority=priorities[i],
                    prompt_logprobs=scores[i],
                ),
            )
            for i in range(count)
        ),
        lag=draw(st.sampled_from([0, 1])),
        max_num_seqs=8,
        max_num_batched_tokens=draw(st.integers(3, 12)),
        num_blocks=30 // block_size + draw(st.integers(1, 6)),
        block_size=block_size,
        caching=draw(st.booleans()),
    )
