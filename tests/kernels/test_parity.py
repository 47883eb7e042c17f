"""Many families, both layouts: a row in a batch that never stops says what `generate()` says of it alone.

Requests join at different steps, are prefilled in chunks, leave while others go on, and take over blocks and state
slots of those that left. Every comparison is also run on sabotaged forwards and must then fail, for every family.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, WINDOW, Family, build
from ragged_steps import BLOCK_SIZE
from sabotage import DeafPool, Shifted, Swapped
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward, plain_attention
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.rope import fix_rope
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowInput, RowState, StepInput

# transformers' own gpt_bigcode still uses it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

CPU = torch.device("cpu")
NEW_TOKENS = 20
CHUNK = 5
PROMPT_LENS = (3, 17, 9, 26)
ARRIVALS = (0, 1, 4, 9)
"""Step at which each request joins. The first leaves at step 20, long before the last."""
TOLERANCE = 1e-4

QUICK = ("llama", "gemma2", "opt", "gpt_oss", "deepseek_v3", "bloom")
"""Of each kind one: window and softcap, absolute positions, sinks and experts, MLA, ALiBi. Of the others the sabotage
is slow."""
NAMES = [pytest.param(name, marks=() if family.common else pytest.mark.slow) for name, family in FAMILIES.items()]
PAIRS = [
    (name, layout)
    for name, family in FAMILIES.items()
    for layout in (("packed", "padded") if family.packed else ("padded",))
]
LAYOUTS = [pytest.param(*pair, marks=() if FAMILIES[pair[0]].common else pytest.mark.slow) for pair in PAIRS]
SABOTAGED = [pytest.param(*pair, marks=() if pair[0] in QUICK else pytest.mark.slow) for pair in PAIRS]


@dataclass(slots=True, frozen=True)
class Reference:
    """What the plain model says of each request alone."""

    model: PreTrainedModel
    sequences: list[list[int]]
    """Prompt and NEW_TOKENS greedy tokens."""
    logits: list[torch.Tensor]
    """Of every position of the sequence but the last, [len - 1, V]."""


def alone(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy `generate()`, and the logits of one forward over its result."""
    model.set_attn_implementation(plain_attention(model))
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.inference_mode():
        logits = model(sequence[:, :-1], use_cache=False).logits[0]
    return sequence[0].tolist(), logits


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


@lru_cache(maxsize=2)
def reference(name: str) -> Reference:
    model = build(FAMILIES[name])
    rows = [alone(model, random_prompt(length, seed=length), NEW_TOKENS) for length in PROMPT_LENS]
    return Reference(model, [sequence for sequence, _ in rows], [logits for _, logits in rows])


@dataclass(slots=True)
class Request:
    """One row's way through the batch."""

    prompt: list[int]
    arrival: int
    new_tokens: int = NEW_TOKENS
    forced: list[int] | None = None
    """Tokens that go on whatever is sampled."""
    sampled: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int = -1

    @property
    def tokens(self) -> list[int]:
        output = self.sampled if self.forced is None else self.forced[: len(self.sampled)]
        return self.prompt + output

    @property
    def done(self) -> bool:
        return len(self.sampled) == self.new_tokens


@dataclass
class Recorder:
    """A forward that computes the logits of every token, keeps them, and hands on those that were wanted."""

    forward: Forward
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        every = range(sum(batch.query_lens))
        self.logits = self.forward(replace(batch, logits_index=torch.tensor(every), logits_tokens=tuple(every)))
        return self.logits[batch.logits_index]

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        return self.forward.computed_slots(batch)


def make_forward(model: PreTrainedModel, layout: str, pool: KVPool) -> Forward:
    return PackedForward(model, pool) if layout == "packed" else PaddedForward(model, pool)


def run(forward: Forward, pool: KVPool, requests: list[Request]) -> None:
    """The schedule: all that have arrived go on by a chunk or a token in every step; greedy, lag 0."""
    state = SamplingState(num_slots=3, vocab_size=VOCAB_SIZE, device=CPU)
    runner = ModelRunner(forward, pool, Sampler(state), BLOCK_SIZE, CPU)
    free_blocks, free_slots = list(range(1, pool.num_blocks)), list(range(state.num_slots))
    step = 0
    while not all(request.done for request in requests):
        joins = []
        for request in requests:
            if request.slot < 0 and request.arrival <= step and not request.done and free_slots:
                request.slot = free_slots.pop()
                joins.append(RowState(request.slot, SamplingParams(temperature=0), request.prompt, []))
        running = [request for request in requests if request.slot >= 0]
        rows = []
        for request in running:
            new = request.tokens[request.computed :][:CHUNK]
            while len(request.blocks) * BLOCK_SIZE < request.computed + len(new):
                request.blocks.append(free_blocks.pop(0))
            sample = request.computed + len(new) == len(request.tokens)
            rows.append(RowInput(request.slot, new, request.computed, list(request.blocks), sample=sample))
        step += 1
        if not rows:
            continue
        output = runner.launch(StepInput(rows, joins)).read()
        assert all(output.finite)
        if isinstance(forward, Recorder):
            lengths = [len(row.token_ids) for row in rows]
            for request, logits in zip(running, forward.logits.split(lengths), strict=True):
                request.logits.append(logits)
        for request, row, token_id in zip(running, rows, output.token_ids, strict=True):
            request.computed += len(row.token_ids)
            if row.sample:
                request.sampled.append(token_id)
            if request.done:
                free_slots.append(request.slot)
                free_blocks = request.blocks + free_blocks  # the next one gets them at once
                request.slot = -1


@dataclass(slots=True, frozen=True)
class Comparison:
    """How a batch did against each request alone."""

    tokens_equal: bool
    largest_difference: float
    """Of logits, teacher-forced, over all positions."""


def compare(forward: Forward, pool: KVPool, expected: Reference) -> Comparison:
    """Teacher-forced: the reference's tokens go on, whatever is sampled. By induction all sampled tokens equal the
    reference's exactly if a free run's do."""
    requests = [
        Request(sequence[:length], arrival, forced=sequence[length:])
        for sequence, length, arrival in zip(expected.sequences, PROMPT_LENS, ARRIVALS, strict=True)
    ]
    run(Recorder(forward), pool, requests)
    gaps = [(torch.cat(r.logits) - logits).abs().max() for r, logits in zip(requests, expected.logits, strict=True)]
    return Comparison(all(r.sampled == r.forced for r in requests), torch.stack(gaps).max().item())


def new_pool() -> KVPool:
    """Reading a slot that was never written shows as NaN."""
    return KVPool(num_blocks=40, block_size=BLOCK_SIZE, fill=torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_worth_comparing(name: str) -> None:
    """Guards the suite itself: a model that repeats itself would pass with any attention at all, and one that is
    undecided between two tokens would fail on another machine."""
    expected = reference(name)
    tokens = [sequence[length:] for sequence, length in zip(expected.sequences, PROMPT_LENS, strict=True)]
    assert len({token for row in tokens for token in row}) >= 20
    assert all(len(row) == NEW_TOKENS for row in tokens)
    assert max(PROMPT_LENS) > 3 * WINDOW
    for logits in expected.logits:
        best, second = logits[-NEW_TOKENS:].topk(2).values.unbind(-1)
        assert (best - second).min() > TOLERANCE * logits.abs().max()


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_batched_rows_say_what_generate_says(name: str, layout: str) -> None:
    """Guards everything between a step and its tokens: joins, chunks, leaving, reused blocks, windows, positions."""
    expected = reference(name)
    pool = new_pool()
    requests = [
        Request(sequence[:length], arrival)
        for sequence, length, arrival in zip(expected.sequences, PROMPT_LENS, ARRIVALS, strict=True)
    ]
    run(make_forward(expected.model, layout, pool), pool, requests)
    assert [request.tokens for request in requests] == expected.sequences
    pool = new_pool()
    forced = compare(make_forward(expected.model, layout, pool), pool, expected)
    assert forced.tokens_equal
    assert forced.largest_difference < TOLERANCE


@pytest.mark.parametrize("sabotage", ["zeros", "shifted", "swapped"])
@pytest.mark.parametrize(("name", "layout"), SABOTAGED)
def test_sabotage_is_noticed(name: str, layout: str, sabotage: str) -> None:
    """Guards the comparison: a model for which broken attention or positions give the same tokens proves nothing."""
    expected = reference(name)
    pool = DeafPool(40, BLOCK_SIZE) if sabotage == "zeros" else new_pool()
    forward = make_forward(expected.model, layout, pool)
    if sabotage == "shifted":
        forward = Shifted(forward, FAMILIES[name].position_ids)
    elif sabotage == "swapped":
        forward = Swapped(forward)
    forced = compare(forward, pool, expected)
    assert not forced.tokens_equal
    assert not forced.largest_difference < 100 * TOLERANCE


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
MAX_MODEL_LEN = 128


def rope_model(rope_type: str) -> PreTrainedModel:
    """A Llama whose long rows are longer than the length it was trained for."""
    base = FAMILIES["llama"]
    original = 32 if rope_type == "dynamic" else MAX_MODEL_LEN
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    config = {**base.config, "max_position_embeddings": original, "rope_parameters": rope}
    return build(Family("llama", config))


def short_row(model: PreTrainedModel, layout: str, neighbour: bool) -> Request:
    """A short request, alone or with a long one that is there before and after it."""
    short = Request(random_prompt(10, seed=1), arrival=2)
    long = Request(random_prompt(70, seed=2), arrival=0, new_tokens=30)
    pool = KVPool(num_blocks=64, block_size=BLOCK_SIZE, fill=torch.nan)
    run(Recorder(make_forward(model, layout, pool)), pool, [long, short] if neighbour else [short])
    return short


def gap(left: Request, right: Request) -> float:
    return (torch.cat(left.logits) - torch.cat(right.logits)).abs().max().item()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rope_type", ROPE)
def test_a_long_neighbour_changes_nothing(rope_type: str, layout: str) -> None:
    """Guards short rows: transformers chooses some frequencies by the longest row of a forward."""
    model = rope_model(rope_type)
    fix_rope(model, MAX_MODEL_LEN)
    without, beside = (short_row(model, layout, neighbour) for neighbour in (False, True))
    assert without.sampled == beside.sampled
    assert gap(without, beside) < 1e-5
    sequence, logits = alone(model, without.prompt, without.new_tokens)
    assert without.tokens == sequence
    assert (torch.cat(without.logits) - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_without_a_fixed_regime_a_long_neighbour_would(rope_type: str, layout: str) -> None:
    """Guards the test above: the two types that depend on the longest row do so in these models."""
    model = rope_model(rope_type)
    without, beside = (short_row(model, layout, neighbour) for neighbour in (False, True))
    assert gap(without, beside) > 100 * TOLERANCE
