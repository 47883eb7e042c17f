"""The Triton sampler on a GPU with a real vocabulary, against `sampler.py` on the CPU. By hand."""

import random
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from ropeway.kernels.sampler import Sampled, Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowState
from ropeway.kernels.triton_sampler import TritonSampler

pytestmark = pytest.mark.gpu
V = 128_256


def mixed(pick: random.Random) -> SamplingParams:
    """Parameters as they come: mostly off."""
    return SamplingParams(
        temperature=pick.choice([0.0, 0.6, 1.0, 1.5]),
        top_k=pick.choice([0, 0, 1, 20, 50, 1000]),
        top_p=pick.choice([1.0, 1.0, 0.95, 0.8, 0.1]),
        min_p=pick.choice([0.0, 0.0, 0.05]),
        repetition_penalty=pick.choice([1.0, 1.0, 1.3]),
        frequency_penalty=pick.choice([0.0, 0.0, 0.5]),
        logit_bias=pick.choice([{}, {}, {7: 3.0, 11: -100.0}]),
        stop_token_ids=(2,),
        min_tokens=pick.choice([0, 5]),
        seed=pick.getrandbits(63),
        logprobs=pick.choice([None, None, 0, 5]),
    )


def sample(device: str, sampler_type: type, rows: list[SamplingParams], logits: torch.Tensor) -> Sampled:
    state = SamplingState(len(rows), V, torch.device(device))
    state.join([RowState(i, params, [5, 6, 7], [9, 9]) for i, params in enumerate(rows)])
    sampler = sampler_type(state)
    slots, positions = torch.arange(len(rows)), torch.full((len(rows),), 5)
    result: Sampled = sampler.sample(logits.to(device), slots, positions)
    return result


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 8.0])
def test_mixed_rows(sharpness: float) -> None:
    """Guards every kind of row in one batch, from nearly flat to peaked logits."""
    pick = random.Random(int(sharpness))
    rows = [mixed(pick) for _ in range(48)]
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(1)) * sharpness
    expected, got = sample("cpu", Sampler, rows, logits), sample("cuda", TritonSampler, rows, logits)
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert got.finite.all()
    assert expected.logprobs is not None and got.logprobs is not None
    assert expected.top_ids is not None and got.top_ids is not None
    for row, params in enumerate(rows):
        if params.logprobs is not None:
            assert got.logprobs[row].item() == pytest.approx(expected.logprobs[row].item(), abs=1e-5)
            count = params.logprobs
            assert got.top_ids[row, :count].tolist() == expected.top_ids[row, :count].tolist()


def test_nothing_waits() -> None:
    """Guards the overlap of host and device: a wait costs every step."""
    rows = [replace(mixed(random.Random(i)), logprobs=2 if i else None) for i in range(8)]
    state = SamplingState(len(rows), V, torch.device("cuda"))
    state.join([RowState(i, params, [5, 6, 7], []) for i, params in enumerate(rows)])
    sampler, logits = TritonSampler(state), torch.randn(len(rows), V, device="cuda")
    slots, positions = torch.arange(len(rows)), torch.full((len(rows),), 3)
    sampler.sample(logits, slots, positions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(logits, slots, positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_frequencies() -> None:
    """Guards the distribution itself: 20,000 draws of a few likely tokens, the fourth beyond top-p."""
    params = SamplingParams(top_p=0.85, top_k=10)
    logits = torch.full((200, V), -10.0)
    logits[:, [3, 70_000, 128_255, 9]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + 12
    counts = torch.zeros(4)
    for step in range(100):
        got = sample("cuda", TritonSampler, [replace(params, seed=step * 1000 + i) for i in range(200)], logits)
        counts += torch.tensor([(got.token_ids == token).sum().item() for token in (3, 70_000, 128_255, 9)])
    assert counts[3] == 0
    torch.testing.assert_close(counts[:3] / 20_000, torch.tensor([4 / 9, 3 / 9, 2 / 9]), atol=0.015, rtol=0)
