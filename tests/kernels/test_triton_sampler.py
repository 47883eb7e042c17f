"""The Triton sampler against `sampler.py`: the same ids, also where scores are equal or rows go wrong."""

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import pytest
import torch

pytest.importorskip("triton")

from ropeway.kernels import triton_sampler
from ropeway.kernels.sampler import Sampled, Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import Edit, RowState
from ropeway.kernels.triton_sampler import TritonSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
V = 300
NO_EDITS: Mapping[int, Edit] = MappingProxyType({})
OUTPUT = [7, 7, 9, 250]
DISTRIBUTIONS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=100.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=3),
    SamplingParams(top_k=V - 1),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.05),
    SamplingParams(top_p=1e-60),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=2.0, min_p=1.0),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.8),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.95, min_p=0.05),
]
CHANGED = [
    SamplingParams(temperature=0.0, repetition_penalty=1.7),
    SamplingParams(frequency_penalty=0.8, presence_penalty=-0.5),
    SamplingParams(logit_bias={5: 9.0, 7: -100.0}),
    SamplingParams(allowed_token_ids=(3, 4, 250), top_p=0.7),
    SamplingParams(temperature=0.0, stop_token_ids=tuple(range(0, V, 2)), min_tokens=10),
    SamplingParams(temperature=0.9),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one cut short."""
    monkeypatch.setattr(triton_sampler, "BLOCK", 128)


def both(
    logits: torch.Tensor,
    params: list[SamplingParams],
    steps: int = 1,
    edits: Mapping[int, Edit] = NO_EDITS,
    processed: bool = False,
) -> list[tuple[Sampled, Sampled]]:
    """(expected, got) of some steps with the same logits [L, V]; row i at slot L - 1 - i, OUTPUT before it."""
    rows = len(params)
    slots = torch.arange(rows).flip(0)
    joins = [RowState(rows - 1 - i, replace(p, seed=1000 + i), [3, 3, 5], OUTPUT) for i, p in enumerate(params)]
    states = [SamplingState(rows, logits.shape[1], device) for device in (CPU, DEVICE)]
    for state in states:
        state.join(joins)
    right, ours = Sampler(states[0], processed), TritonSampler(states[1], processed)
    pairs = []
    for step in range(steps):
        positions = torch.full((rows,), 7 + step)
        expected = right.sample(logits, slots, positions, edits)
        pairs.append((expected, ours.sample(logits.to(DEVICE), slots, positions, edits)))
    return pairs


def random_logits(rows: int, seed: int, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_distributions(ties: bool) -> None:
    """Guards every filter, alone and together, in one batch: threshold searches, equal scores, noise."""
    for expected, got in both(random_logits(len(DISTRIBUTIONS), 1, ties), DISTRIBUTIONS, steps=2):
        assert got.token_ids.tolist() == expected.token_ids.tolist()
        assert got.finite.all() and got.finite.dtype == torch.bool


def test_bias_penalties_and_bans() -> None:
    """Guards processing, its order, the counting (a third token depends on it), and rows that need none of it."""
    for expected, got in both(random_logits(len(CHANGED), 2), CHANGED, steps=3):
        assert got.token_ids.tolist() == expected.token_ids.tolist()


def test_edits() -> None:
    """Guards edits: applied to processed scores, before the filters, in their own line alone; one fails alone."""
    params = [*CHANGED, *DISTRIBUTIONS[:10]]
    seen: dict[int, list[torch.Tensor]] = {}

    def lift(line: int, scores: torch.Tensor) -> None:
        seen.setdefault(line, []).append(scores.detach().cpu().clone())
        scores[line + 20] = scores.amax() + 5
        scores[scores < scores.mean()] = -torch.inf

    def fail(scores: torch.Tensor) -> None:
        scores.fill_(torch.nan)
        raise RuntimeError("no")

    edits = {line: partial(lift, line) for line in (0, 2, 4, 9, 15)} | {7: fail}
    logits = random_logits(len(params), 4)
    unedited = both(logits, params)[0][0].token_ids
    for expected, got in both(logits, params, steps=2, edits=edits):
        others = [line for line in range(len(params)) if line != 7]
        assert got.token_ids[others].tolist() == expected.token_ids[others].tolist()
        assert got.finite[others].all() and expected.finite[others].all()
        message = "Editing this request's scores failed: RuntimeError: no"
        assert got.errors == expected.errors == {7: message}
    assert (unedited == both(logits, params, edits=edits)[0][1].token_ids.cpu())[[1, 3, 5, 6, 8, 10]].all()
    assert seen[2][0][7] == -torch.inf and torch.equal(seen[2][0], seen[2][1])


def test_top_k_among_scores_that_nearly_agree() -> None:
    """Guards the last digits of the search: one token too many among 100 of 299 shows in most rows."""
    logits = -5 - torch.rand(24, V, generator=torch.Generator().manual_seed(6)) * 1e-3
    logits[:, 17] = 0
    ((expected, got),) = both(logits, [SamplingParams(temperature=3.0, top_k=k) for k in (2, 100, 250)] * 8)
    assert got.token_ids.tolist() == expected.token_ids.tolist()


def test_penalties_that_decide() -> None:
    """Guards each penalty's own count: prompt or output, once or many times, and what a step adds to it."""
    pick = random.Random(7)
    params = [
        SamplingParams(
            temperature=0.0,
            repetition_penalty=pick.choice([1.0, 1.3, 0.8]),
            frequency_penalty=pick.choice([0.0, 0.5, 1.0]),
            presence_penalty=pick.choice([0.0, 0.4, -0.3]),
        )
        for _ in range(12)
    ]
    logits = torch.full((12, V), -20.0)
    logits[:, [3, 5, 7, 8, 9, 250]] = torch.randn(12, 6, generator=torch.Generator().manual_seed(8)) + 1
    for expected, got in both(logits, params, steps=6):
        assert got.token_ids.tolist() == expected.token_ids.tolist()


def test_a_greedy_batch_and_an_unfiltered_one() -> None:
    """Guards the launches that are left out."""
    for temperature in (0.0, 1.0):
        for expected, got in both(random_logits(3, 3), [SamplingParams(temperature=temperature)] * 3, steps=2):
            assert got.token_ids.tolist() == expected.token_ids.tolist()


def test_a_slots_last_bias_is_gone() -> None:
    """Guards stale state: bias and history of the row that had the slot before, beside a row that has its own."""
    own = SamplingParams(logit_bias={5: 99.0}, repetition_penalty=3.0, temperature=0.0)
    state = SamplingState(2, V, DEVICE)
    sampler, logits = TritonSampler(state), torch.zeros(2, V, device=DEVICE)
    logits[:, 1] = 1
    slots, positions = torch.arange(2), torch.ones(2, dtype=torch.int64)
    state.join([RowState(slot, own, [1], []) for slot in range(2)])
    assert sampler.sample(logits, slots, positions).token_ids.tolist() == [5, 5]
    state.join([RowState(0, SamplingParams(temperature=0.0), [1], [])])
    assert sampler.sample(logits, slots, positions).token_ids.tolist() == [1, 5]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.9), CHANGED[0]])
def test_rows_that_went_wrong(params: SamplingParams) -> None:
    """Guards the flag, ids that stay valid, searches that must end, and the good row between the bad ones."""
    logits = random_logits(5, 4)
    logits[0, 17], logits[1, 299], logits[3], logits[4] = torch.nan, torch.inf, -torch.inf, torch.nan
    ((expected, got),) = both(logits, [params] * 5)
    assert got.finite.tolist() == expected.finite.tolist() == [False, False, True, False, False]
    assert got.token_ids[2] == expected.token_ids[2]
    assert all(0 <= token_id < V for token_id in got.token_ids.tolist())


@pytest.mark.parametrize("params", [DISTRIBUTIONS, CHANGED], ids=["distributions", "changed"])
def test_processed_logprobs(params: list[SamplingParams]) -> None:
    """Guards `processed_logprobs`: what is drawn from, also where the kernels never hold it as a whole."""
    wanted = [replace(one, logprobs=4) for one in params]
    for expected, got in both(random_logits(len(params), 6), wanted, steps=2, processed=True):
        assert got.token_ids.tolist() == expected.token_ids.tolist()
        for name in ("logprobs", "top_ids", "top_logprobs"):
            torch.testing.assert_close(getattr(got, name).cpu(), getattr(expected, name), atol=1e-5, rtol=1e-5)


def test_logprobs() -> None:
    """Guards the model's own distribution, also where scores were changed, and rows that did not ask."""
    params = [SamplingParams(logprobs=3, logit_bias={5: 99.0}), SamplingParams(), SamplingParams(logprobs=0)]
    ((expected, got),) = both(random_logits(3, 5, ties=True), params)
    assert expected.logprobs is not None and expected.top_ids is not None and expected.top_logprobs is not None
    assert got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None
    asked = [0, 2]
    torch.testing.assert_close(got.logprobs[asked].cpu(), expected.logprobs[asked], atol=1e-5, rtol=0)
    assert got.top_ids[0].tolist() == expected.top_ids[0].tolist()
    torch.testing.assert_close(got.top_logprobs[0].cpu(), expected.top_logprobs[0], atol=1e-5, rtol=0)
