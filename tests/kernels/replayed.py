"""The engine around a tiny model, with steps rounded up and replayed, or as they come; and requests that shake it."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from families import VOCAB_SIZE
from ragged_steps import BLOCK_SIZE

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward
from ropeway.kernels.graphs import Launches
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import AddRequest, ChoiceStart
from ropeway.scheduler.pace import Pace
from ropeway.scheduler.scheduler import Scheduler

ROWS = 7
CHUNK = 24
MAX_LEN = 100
NUM_BLOCKS = 30
"""Fewer than seven long rows want: some are preempted."""


class TrueLengths:
    """A forward that reads the rows' lengths back: CPU attention uses the host's, a replay has those of its capture.

    Those must bound the true ones: from them a GPU's attention knows which kernels no row needs."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        query_lens, context_lens = batch.row_start.diff().tolist(), batch.context_len.tolist()
        assert max(query_lens) <= batch.T and max(context_lens) <= max(batch.context_lens), "a bound does not hold"
        assert min(query for query in query_lens if query) >= min(batch.query_lens), "a bound does not hold"
        return self._forward(replace(batch, query_lens=tuple(query_lens), context_lens=tuple(context_lens)))

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        return self._forward.computed_slots(batch)


class SteadyPace(Pace):
    """Chunks whose sizes depend on no measured time, so that every run has the same steps."""

    def observe(self, *measured: object) -> None:
        """Learns nothing."""


def repeat(launches: Launches) -> Launches:
    """Stands for a capture: the replay is the thing itself."""
    launches()
    return launches


def requests(seed: int, count: int = 18) -> dict[int, list[AddRequest]]:
    """Step -> the requests that come then: greedy, drawn, filtered, penalised, banned, with logprobs, forked."""
    rng = random.Random(seed)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=-5),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(temperature=0, stop_token_ids=tuple(range(40)), min_tokens=6),
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(temperature=0.9, seed=9, logit_bias={3: 5.0}),
    ]
    arrivals: dict[int, list[AddRequest]] = {}
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(2 * BLOCK_SIZE)]
    for number in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17, 40]))]
        choices = [ChoiceStart(index) for index in range(2 if number % 6 == 5 else 1)]
        request = AddRequest(
            1, number, shared + own if number % 3 else own, params[number % 8], rng.randint(1, 40), choices
        )
        arrivals.setdefault(rng.randrange(60), []).append(request)
    return arrivals


def run(runner: ModelRunner, arrivals: dict[int, list[AddRequest]], between: Callable[[int], None]) -> dict:
    """(request, choice) -> tokens, with lag 1; some requests are aborted. `between` is called before every step."""
    limits = Limits(ROWS, CHUNK, MAX_LEN)
    engine = Engine(Scheduler(limits, BlockPool(NUM_BLOCKS, BLOCK_SIZE)), runner, 1)
    engine.scheduler.pace = SteadyPace()
    tokens: dict[tuple[int, int], list[object]] = {}
    step = 0
    while engine.has_work or step <= max(arrivals):
        for request in arrivals.get(step, []):
            engine.add(0, request)
        for request in arrivals.get(step - 9, [])[1:]:
            engine.scheduler.abort(0, request.request_id)
        between(step)
        for output in engine.step(now=0.0).get(0, []):
            logprobs = [[token for token, _ in entry.top] for entry in output.logprobs or []]
            tokens.setdefault((output.request_id, output.choice), []).extend([*output.token_ids, *logprobs])
            assert output.error is None, output.error
        step += 1
        assert step < 5000
    assert engine.scheduler.stats.preemptions > 0, "nothing was preempted"
    return tokens
