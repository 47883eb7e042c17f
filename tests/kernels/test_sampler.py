"""The sampler against transformers' processors, OpenAI's formulas, and its own promises."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ropeway.kernels.sampler import Sampled, Sampler, top_k, top_p
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowState

CPU = torch.device("cpu")
PROMPT = [3, 3, 5]


def make_sampler(vocab_size: int, rows: list[SamplingParams], output: list[int] | None = None) -> Sampler:
    """Row i is at slot i, with PROMPT before it."""
    state = SamplingState(len(rows), vocab_size, CPU)
    state.join([RowState(slot, params, PROMPT, output or []) for slot, params in enumerate(rows)])
    return Sampler(state)


def sample(logits: torch.Tensor, rows: list[SamplingParams], output: list[int] | None = None) -> Sampled:
    """One step of fresh rows; logits [L, V]."""
    sampler = make_sampler(logits.shape[1], rows, output)
    position = len(PROMPT) + len(output or [])
    return sampler.sample(logits, torch.arange(len(rows)), torch.full((len(rows),), position))


def warpers(params: SamplingParams) -> LogitsProcessorList:
    """What `generate()` makes of the same parameters, in its order."""
    chosen = LogitsProcessorList()
    if params.temperature != 1:
        chosen.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(MinPLogitsWarper(params.min_p))
    return chosen


VARIED = torch.tensor([2.0, -1.0, 0.5, 3.1, 2.9, -4.0, 1.0, 0.0, 2.2, -0.7, 1.6, -9.0, 0.9])
TIED = torch.tensor([1.0, 2.0, 2.0, 0.5, 2.0, 1.0, 1.0, -1.0, 0.5, 2.0, 1.0, -1.0, 0.5])
FLAT = torch.zeros(13)
DISTRIBUTIONS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=1e-6),
    SamplingParams(temperature=100.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=3),
    SamplingParams(top_k=13),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=0.83),
    SamplingParams(top_p=0.37),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_p=1e-60),
    SamplingParams(top_p=0.999),
    SamplingParams(min_p=0.21),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.7, top_k=7, top_p=0.83),
    SamplingParams(temperature=0.6, top_k=9, top_p=0.93, min_p=0.07),
    SamplingParams(temperature=100.0, top_p=0.53, min_p=0.5),
    SamplingParams(temperature=3.0, top_k=100, top_p=0.71, min_p=0.01),
]


@pytest.mark.parametrize("logits", [VARIED, TIED, FLAT], ids=["varied", "tied", "flat"])
@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=lambda p: f"{p.temperature}-{p.top_k}-{p.top_p}-{p.min_p}")
def test_distribution_is_that_of_transformers(params: SamplingParams, logits: torch.Tensor) -> None:
    """Guards the meaning of every filter, their order, ties and extremes: chi-square over many positions."""
    draws = 4000
    sampler = make_sampler(len(logits), [replace(params, seed=11)])
    slots = torch.zeros(draws, dtype=torch.int64)
    drawn = sampler.sample(logits.expand(draws, -1), slots, torch.arange(draws)).token_ids
    counts = torch.bincount(drawn, minlength=len(logits)).double()
    expected = warpers(params)(torch.tensor([PROMPT]), logits.unsqueeze(0)).double().softmax(-1)[0] * draws
    assert not counts[expected == 0].any()
    common = expected >= 5
    assert counts[(expected > 0) & ~common].sum() <= 5 + 3 * expected[~common].sum()
    if common.sum() > 1:
        share = counts[common].sum() / expected[common].sum()
        assert stats.chisquare(counts[common].numpy(), (expected[common] * share).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("quantised", [False, True])
def test_kept_tokens_are_those_of_transformers(scale: float, quantised: bool) -> None:
    """Guards the selection without sorting, on a vocabulary where every digit of the search matters."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 5000, generator=generator) * scale
    if quantised:  # thousands of equals
        logits = (logits * 2).round() / 2
    scores = logits - logits.amax(-1, keepdim=True)
    for p in (0.05, 0.31, 0.77, 0.953):
        expected = TopPLogitsWarper(p)(torch.empty(0), scores).isfinite()
        kept = top_p(scores, scores.softmax(-1), torch.full((6,), p)).isfinite()
        # Which of equals stay depends on transformers' sort, which is not stable; how many does not. It adds up 5000
        # probabilities in fp32: at the edge its sum may be off by some 1e-6.
        probs = scores.double().softmax(-1)
        assert ((probs * kept).sum(-1) - (probs * expected).sum(-1)).abs().max() < 2e-5
        for row in range(6):
            assert scores[row][kept[row]].min() == pytest.approx(scores[row][expected[row]].min().item(), abs=1e-2)
            assert scores[row][~kept[row]].max() <= scores[row][kept[row]].min()
    ks = torch.tensor([1, 2, 17, 50, 999, 4999])
    kept = top_k(scores, ks, 4999)
    for row, k in enumerate(ks.tolist()):
        assert torch.equal(kept[row], TopKLogitsWarper(k)(torch.empty(0), scores[row : row + 1])[0])


def test_filters_in_one_batch_are_those_of_each_row() -> None:
    """Guards batching by kind of work: every combination side by side draws what it draws alone, in any order."""
    generator = torch.Generator().manual_seed(2)
    rows = [replace(params, seed=i, logprobs=i % 4 - 1 if i % 4 else None) for i, params in enumerate(DISTRIBUTIONS)]
    rows += [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
        SamplingParams(seed=5, frequency_penalty=0.7, presence_penalty=-0.4, top_p=0.9),
        SamplingParams(seed=6, logit_bias={1: 3.0, 2: -100.0}, logprobs=0),
        SamplingParams(seed=7, allowed_token_ids=(3, 5, 8), top_k=2),
        SamplingParams(seed=8, stop_token_ids=(0, 4), min_tokens=10),
    ]
    logits = torch.randn(len(rows), 997, generator=generator) * 3
    together = sample(logits, rows, [1, 5, 5])
    order = torch.randperm(len(rows), generator=generator).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order], [1, 5, 5])
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1], [rows[i]], [1, 5, 5])
        for batch, at in ((together, i), (shuffled, place)):
            assert batch.token_ids[at] == alone.token_ids[0], rows[i]
            asked = rows[i].logprobs
            if asked is None:
                assert alone.logprobs is None
                continue
            assert batch.logprobs is not None and alone.logprobs is not None
            assert batch.logprobs[at] == alone.logprobs[0]
            if asked:
                assert batch.top_ids is not None and alone.top_ids is not None
                assert torch.equal(batch.top_ids[at, :asked], alone.top_ids[0])
                assert batch.top_logprobs is not None and alone.top_logprobs is not None
                assert torch.equal(batch.top_logprobs[at, :asked], alone.top_logprobs[0])


def test_repetition_penalty_and_bias_are_those_of_transformers() -> None:
    """Guards both signs of a logit, prompt and output alike, and bias before penalty as in `generate()`."""
    generator = torch.Generator().manual_seed(4)
    for i in range(300):
        logits = torch.randn(1, 12, generator=generator) - i % 3  # the winner is negative too
        output = torch.randint(0, 12, (4,), generator=generator).tolist()
        penalty = 0.5 + 2 * torch.rand((), generator=generator).item()
        bias = {token: torch.randn((), generator=generator).item() for token in (0, 3, output[0])}
        history = torch.tensor([PROMPT + output])
        expected = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(history, logits)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(history, expected)
        params = SamplingParams(temperature=0, repetition_penalty=penalty, logit_bias=bias)
        assert sample(logits, [params], output).token_ids.item() == expected.argmax()


def test_frequency_and_presence_penalties_are_those_of_openai() -> None:
    """Guards the formula of the API reference: mu[j] - c[j] * frequency - (c[j] > 0) * presence, output alone."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        logits = torch.randn(1, 12, generator=generator)
        output = torch.randint(0, 12, (6,), generator=generator).tolist()
        frequency, presence = (4 * torch.rand(2, generator=generator) - 2).tolist()
        adjusted = [
            logit - output.count(j) * frequency - (output.count(j) > 0) * presence
            for j, logit in enumerate(logits[0].tolist())
        ]
        params = SamplingParams(temperature=0, frequency_penalty=frequency, presence_penalty=presence)
        assert sample(logits, [params], output).token_ids.item() == adjusted.index(max(adjusted))


def test_greedy_is_the_first_of_the_largest() -> None:
    """Guards greedy rows: no noise, no filter, the lowest id of equals like `torch.argmax` in `generate()`."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(8, 50, generator=generator).round()
    rows = [SamplingParams(temperature=0, top_k=i, top_p=0.5, min_p=0.3, seed=i) for i in range(8)]
    assert torch.equal(sample(logits, rows).token_ids, logits.argmax(-1))


def run(sampler: Sampler, logits: torch.Tensor, start: int, stop: int, slot: int = 0) -> list[int]:
    """Steps of one row: the token at position len(PROMPT) + i is sampled from logits[i]."""
    return [
        sampler.sample(logits[i : i + 1], torch.tensor([slot]), torch.tensor([len(PROMPT) + i])).token_ids.item()
        for i in range(start, stop)
    ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=-9, temperature=1.3),
        SamplingParams(seed=1, frequency_penalty=0.8, presence_penalty=0.3, repetition_penalty=1.2, top_p=0.95),
        SamplingParams(temperature=0, frequency_penalty=1.5),
        SamplingParams(seed=2, stop_token_ids=(0, 1, 2, 3), min_tokens=11, top_k=5),
    ],
)
def test_a_row_that_joins_again_goes_on_as_if_never_gone(params: SamplingParams) -> None:
    """Guards preemption and the resuming of streams: seed, counts and min_tokens survive the change of slot."""
    logits = torch.randn(24, 9, generator=torch.Generator().manual_seed(8))
    whole = run(make_sampler(9, [params]), logits, 0, 24)
    for cut in (1, 7, 12, 23):
        state = SamplingState(3, 9, CPU)
        state.join([RowState(2, SamplingParams(repetition_penalty=3.0, presence_penalty=2.0), [1] * 5, [2] * 5)])
        state.join([RowState(2, params, PROMPT, whole[:cut])])
        assert run(Sampler(state), logits, cut, 24, slot=2) == whole[cut:]


def test_seed_and_position_decide() -> None:
    """Guards reproducibility, and against a seed or a position that is ignored."""
    logits = torch.zeros(1, 1000)

    def draw(seed: int, position: int) -> int:
        sampler = make_sampler(1000, [SamplingParams(seed=seed)])
        return int(sampler.sample(logits, torch.tensor([0]), torch.tensor([position])).token_ids.item())

    assert [draw(1, i) for i in range(20)] == [draw(1, i) for i in range(20)]
    assert len({draw(1, i) for i in range(20)}) > 15
    assert len({draw(i, 1) for i in range(20)}) > 15
    assert len({draw(i << 32, 1) for i in range(20)}) > 15


def test_min_tokens_bans_stop_ids_until_then() -> None:
    """Guards the step where the ban ends: with min_tokens 2 the third token may stop."""
    params = SamplingParams(temperature=0, stop_token_ids=(4, 2), min_tokens=2)
    logits = torch.tensor([[0.0, 1.0, 8.0, 0.0, 9.0]]).expand(4, -1)
    assert run(make_sampler(5, [params]), logits, 0, 4) == [1, 1, 4, 4]


def test_allowed_ids_and_bans() -> None:
    """Guards hard limits under noise: nothing outside of them is ever drawn, at any temperature."""
    draws = 500
    slots, positions = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
    params = SamplingParams(allowed_token_ids=(2, 7, 9), temperature=100.0, logit_bias={7: -100.0, 1: 100.0})
    drawn = make_sampler(11, [params]).sample(torch.randn(draws, 11), slots, positions).token_ids
    assert set(drawn.tolist()) == {2, 9}


def test_bad_rows_are_named_and_poison_nobody() -> None:
    """Guards neighbours of a row of NaN: flags are per row, ids stay in the vocabulary, other rows are untouched."""
    good = torch.randn(1, 40, generator=torch.Generator().manual_seed(9))
    nan, infinite, nothing = good.clone(), good.clone(), torch.full_like(good, -torch.inf)
    nan[0, 5], infinite[0, 6] = torch.nan, torch.inf
    all_nan = torch.full_like(good, torch.nan)
    variants = [
        SamplingParams(temperature=0, logprobs=3),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=3, top_p=0.8, min_p=0.01, logprobs=2),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(seed=1, repetition_penalty=1.2, frequency_penalty=0.4, logit_bias={5: -100.0, 6: -100.0}),
        SamplingParams(seed=1, allowed_token_ids=(1, 2)),
        SamplingParams(seed=1, stop_token_ids=(5, 6), min_tokens=5),
    ]
    for params in variants:
        logits = torch.cat((good, nan, good, infinite, nothing, all_nan, good))
        batch = sample(logits, [params] * len(logits))
        assert batch.finite.tolist() == [True, False, True, False, False, False, True], params
        assert ((batch.token_ids >= 0) & (batch.token_ids < 40)).all()
        assert set(batch.token_ids[[0, 2, 6]].tolist()) == set(sample(good, [params]).token_ids.tolist())
        for bad in (nan, infinite, nothing, all_nan):
            alone = sample(bad, [params])
            assert not alone.finite.item() and 0 <= alone.token_ids.item() < 40
    partly = good.clone()
    partly[0, ::2] = -torch.inf
    assert sample(partly, [SamplingParams()]).finite.item()


def test_a_row_whose_bans_leave_nothing_ends_with_an_error() -> None:
    """Guards against a banned token coming out silently when a request contradicts itself."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(10))
    for params in (
        SamplingParams(allowed_token_ids=(2,), stop_token_ids=(2,), min_tokens=1),
        SamplingParams(allowed_token_ids=(2,), logit_bias={2: -100.0}, temperature=0, top_p=0.5),
        SamplingParams(logit_bias=dict.fromkeys(range(6), -100.0), top_p=0.5),
    ):
        batch = sample(logits, [params, SamplingParams(seed=3)])
        assert batch.finite.tolist() == [False, True]
        assert 0 <= batch.token_ids[0] < 6


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-37, 1e-45, 1e30])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    """Guards the division: a large logit over a small temperature is infinite in fp32, and inf - inf is NaN."""
    logits = torch.tensor([[1e30, 9e29, -1e38, -torch.inf, 0.0]])
    for params in (
        SamplingParams(temperature=temperature),
        SamplingParams(temperature=temperature, top_p=0.9, top_k=3),
    ):
        got = sample(logits, [params])
        assert got.finite.item()
        assert got.token_ids.item() == 0 if temperature < 1 else got.token_ids.item() in (0, 1, 4)


def test_logprobs_are_of_the_models_own_logits() -> None:
    """Guards what clients read: before penalties, temperature and bans, chosen id included, equals by lower id."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, -torch.inf]]).repeat(3, 1)
    rows = [
        SamplingParams(temperature=0, logit_bias={0: 50.0}, repetition_penalty=2.0, logprobs=4),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=0),
    ]
    got = sample(logits, rows)
    exact = logits.double().log_softmax(-1)[0]
    assert got.token_ids.tolist() == [0, 1, 1]
    assert got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None
    assert got.logprobs[[0, 2]].tolist() == pytest.approx([exact[0].item(), exact[1].item()], abs=1e-6)
    assert got.top_ids[0].tolist() == [1, 2, 4, 3]
    assert got.top_logprobs[0].tolist() == pytest.approx(exact[[1, 2, 4, 3]].tolist(), abs=1e-6)
    beyond = sample(logits[:1], [SamplingParams(temperature=0, logprobs=20)])
    assert beyond.top_ids is not None and beyond.top_ids[0].tolist() == [1, 2, 4, 3, 0, 5]


def test_processed_logprobs_are_of_what_is_drawn_from() -> None:
    """Guards `processed_logprobs`: after bias, temperature and filters; what they ban has -inf; greedy rows have no
    temperature; rows that did not ask cost nothing and disturb nobody."""
    logits = torch.tensor([[1.0, 3.0, 2.5, 2.0, -1.0, 0.0]]).repeat(4, 1)
    rows = [
        SamplingParams(temperature=0, logit_bias={0: 50.0}, logprobs=2),
        SamplingParams(temperature=0.5, top_k=3, logprobs=6),
        SamplingParams(temperature=2.0, logprobs=0),
        SamplingParams(top_k=1),
    ]
    state = SamplingState(4, 6, torch.device("cpu"))
    state.join([RowState(slot, params, [5], []) for slot, params in enumerate(rows)])
    got = Sampler(state, processed_logprobs=True).sample(logits, torch.arange(4), torch.full((4,), 1))
    assert got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None
    biased = (logits[0] + torch.tensor([50.0, 0, 0, 0, 0, 0])).log_softmax(-1)
    assert got.top_logprobs[0, :2].tolist() == pytest.approx(biased[[0, 1]].tolist(), abs=1e-5)
    kept = (logits[0, 1:4] / 0.5).log_softmax(-1)
    assert got.top_ids[1, :3].tolist() == [1, 2, 3]
    assert got.top_logprobs[1, :3].tolist() == pytest.approx(kept.tolist(), abs=1e-5)
    assert got.top_logprobs[1, 3:].isneginf().all()
    hot = (logits[2] / 2).log_softmax(-1)
    assert got.logprobs[2].item() == pytest.approx(hot[got.token_ids[2]].item(), abs=1e-5)


def test_logits_are_not_changed() -> None:
    """Guards the caller's tensor: a static buffer on a GPU, compared with a reference in tests."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(12))
    before = logits.clone()
    params = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=1.0,
        logit_bias={3: -100.0},
        stop_token_ids=(1,),
        min_tokens=9,
        top_k=4,
        top_p=0.7,
        min_p=0.1,
        logprobs=1,
    )
    sample(logits, [params, SamplingParams(temperature=0), SamplingParams()])
    assert torch.equal(logits, before)
