"""The real engine on a real model: a request's tokens depend on nothing but the request.

Real scheduler, runner, pool, forwards and sampler, in float64 so that a flipped token is a bug and not rounding. Pools
start full of NaN: whoever reads a slot that nobody wrote is found out.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.kernels.forward import use_attention
from ropeway.kernels.fp8_cache import Scales
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.probe import choose_layout
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.engine import Engine
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import AddRequest, ChoiceStart
from ropeway.scheduler.row import NO_BUILDERS, BuildEdit
from ropeway.scheduler.scheduler import Scheduler

BLOCK = 4
VOCAB = 97
MAX_LEN = 160
Layout = Literal["packed", "padded"]
Answers = dict[tuple[int, int], tuple[list[int], str | None]]
"""(request, choice) -> tokens and finish reason."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
    )
    built = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # as made, it says one token for ever
    return built


@dataclass(frozen=True)
class Setup:
    """Everything that must not matter."""

    layout: Layout = "packed"
    lag: Literal[0, 1] = 0
    chunk: int = 512
    blocks: int = 400
    rows: int = 16
    caching: bool = True
    scales: Mapping[int, Scales] | None = field(default=None, compare=False)
    """Of a cache in FP8; this alone matters."""


def build(model: LlamaForCausalLM, setup: Setup, builders: Mapping[str, BuildEdit] = NO_BUILDERS) -> Engine:
    pool = KVPool(setup.blocks, BLOCK, float("nan"), setup.scales)
    forward = PackedForward(model, pool) if setup.layout == "packed" else PaddedForward(model, pool)
    device = torch.device("cpu")
    sampler = Sampler(SamplingState(setup.rows, VOCAB, device))
    limits = Limits(setup.rows, setup.chunk, MAX_LEN)
    scheduler = Scheduler(limits, BlockPool(setup.blocks, BLOCK, caching=setup.caching), builders)
    return Engine(scheduler, ModelRunner(forward, pool, sampler, BLOCK, device), setup.lag)


def run(engine: Engine, arrivals: dict[int, list[AddRequest]]) -> Answers:
    """Adds requests at the given steps and runs until all have ended, checking the blocks after every step."""
    answers: Answers = {}
    tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
    step = 0
    while engine.has_work or step <= max(arrivals):
        for request in arrivals.get(step, []):
            engine.add(0, request)
        for output in engine.step(now=0.0).get(0, []):
            row = (output.request_id, output.choice)
            tokens[row] += output.token_ids
            if output.finish_reason:
                answers[row] = (tokens[row], output.finish_reason)
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5000, "the batch does not come to an end"
    return answers


def requests() -> list[AddRequest]:
    """Greedy and sampled, short and long, with a shared prefix, penalties, stop ids, several choices."""
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(41)]
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=-5),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(temperature=1.2, min_p=0.05, presence_penalty=1.0, seed=2**63 - 1, stop_token_ids=(7, 11, 13)),
        SamplingParams(temperature=0, stop_token_ids=tuple(range(40)), min_tokens=6),
    ]
    made = []
    for number in range(14):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 16, 17, 60]))]
        prompt = shared + own if number % 3 == 0 else own
        choices = [ChoiceStart(index) for index in range(3 if number % 5 == 1 else 1)]
        made.append(AddRequest(1, number, prompt, params[number % len(params)], rng.randint(1, 30), choices))
    return made


@pytest.fixture(scope="module")
def alone(model: LlamaForCausalLM) -> Answers:
    """What each choice of each request gets with the engine to itself."""
    return _alone(model, Setup(caching=False))


def _alone(model: LlamaForCausalLM, setup: Setup) -> Answers:
    answers: Answers = {}
    for request in requests():
        for choice in request.choices:
            answers |= run(build(model, setup), {0: [_only(request, choice.index)]})
    return answers


def _only(request: AddRequest, index: int) -> AddRequest:
    """One choice of a request, as a request of its own."""
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return AddRequest(**fields | {"choices": [ChoiceStart(index)]})


def test_reference_is_generate(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards the reference itself: greedy rows alone are transformers' greedy rows, and they are no monotone."""
    seen = set()
    use_attention(model, "sdpa")
    for request in requests():
        if request.sampling != SamplingParams(temperature=0):
            continue
        ids = torch.tensor([request.prompt_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=request.max_tokens, eos_token_id=None)
        assert alone[request.request_id, 0][0] == expected[0, ids.shape[1] :].tolist()
        seen |= set(alone[request.request_id, 0][0])
    assert len(seen) >= 20


SETUPS = [
    Setup(layout=layout, lag=lag, chunk=chunk, blocks=blocks, rows=rows, caching=caching)
    for layout in ("packed", "padded")
    for lag in (0, 1)
    for chunk, blocks, rows, caching in [
        (512, 400, 16, True),
        (16, 400, 5, True),
        (24, 48, 16, True),
        (40, 48, 9, False),
    ]
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_nothing_else_matters(model: LlamaForCausalLM, alone: Answers, setup: Setup) -> None:
    """Guards the promise: neighbours, arrival, chunks, cache, preemption, layout and lag change no token."""
    engine = build(model, setup)
    for seed in range(2):  # the second time on a warm cache
        rng = random.Random(seed)
        arrivals: dict[int, list[AddRequest]] = defaultdict(list)
        for request in requests():
            arrivals[rng.randrange(25)].append(request)
        assert run(engine, arrivals) == alone
    scheduler = engine.scheduler
    assert not scheduler.running and not scheduler.waiting and scheduler.pool.usage == 0
    assert (scheduler.stats.preemptions > 0) == (setup.blocks < 100)
    assert (scheduler.stats.prefix_hits > 0) == setup.caching


def test_nothing_else_matters_with_a_cache_in_fp8(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards the rounding of K and V: it depends on nothing but the token, and it is there."""
    scales = choose_layout(model, MAX_LEN).scales
    rounded = _alone(model, Setup(caching=False, scales=scales))
    assert rounded != alone
    for setup in (SETUPS[1], SETUPS[6], SETUPS[10], SETUPS[15]):
        assert run(build(model, replace(setup, scales=scales)), {0: requests()}) == rounded


def test_resumed_after_a_crash(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards streams over an engine crash: with the tokens already sent, a new engine goes on where the old one was."""
    for request in requests():
        tokens, reason = alone[request.request_id, 0]
        if len(tokens) < 2:
            continue
        sent = tokens[: len(tokens) // 2]
        resumed = _only(request, 0)
        resumed.choices[0].output_ids.extend(sent)
        answers = run(build(model, Setup(lag=1, chunk=16)), {0: [resumed]})
        assert answers == {(request.request_id, 0): (tokens[len(sent) :], reason)}


def test_a_wrong_block_is_noticed(model: LlamaForCausalLM, alone: Answers) -> None:
    """Guards this file: a row that joins with one block of its neighbour must say something else.

    (Two full blocks of one row that change places would not show: keys carry their positions.)
    """
    engine = build(model, Setup())
    plan = engine.scheduler.plan

    def wrong(now: float) -> object:
        step = plan(now)
        rows = step.step.rows if step else []
        for row, neighbour in pairwise(rows):
            if row.start == 0 and len(row.token_ids) > BLOCK:
                row.block_table = [neighbour.block_table[0], *row.block_table[1:]]
        return step

    engine.scheduler.plan = wrong  # type: ignore[method-assign,assignment]
    assert run(engine, {0: requests()}) != alone


def test_setups_differ() -> None:
    """Guards the list above: each setup is tried once."""
    assert len(set(SETUPS)) == len(SETUPS) and replace(SETUPS[0], lag=1) in SETUPS
