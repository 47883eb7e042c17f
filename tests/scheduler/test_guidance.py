"""Guidance: a row beside its negative prompt gives what `generate(guidance_scale=...)` gives, alone and in company."""

import random

import pytest
import torch
from test_beam import BUILDERS, run
from test_same_tokens import VOCAB, Setup, build, model
from transformers import LlamaForCausalLM

from ropeway.kernels.forward import use_attention
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.guidance import GUIDANCE
from ropeway.scheduler.messages import AddRequest, ChoiceStart, EditSpec

__all__ = ["model"]  # the fixture

TOKENS = 14


def request(number: int, prompt: list[int], negative: list[int], scale: float, output: list[int] | None = None):
    edits = [EditSpec(GUIDANCE, {"scale": scale, "negative_prompt_ids": negative})] if scale != 1 else []
    starts = [ChoiceStart(0, output or []), ChoiceStart(1, output or [])]
    params = SamplingParams(temperature=0)
    return AddRequest(1, number, prompt, params, TOKENS, starts, arrival=float(number), edits=edits)


@pytest.fixture(scope="module")
def cases() -> list[tuple[list[int], list[int], float]]:
    pick = random.Random(2)

    def ids(count: int) -> list[int]:
        return [pick.randrange(1, VOCAB) for _ in range(count)]

    return [
        (ids(pick.choice([1, 5, 17])), ids(pick.choice([0, 3, 22])), pick.choice([1, 1.5, 3, 0.5])) for _ in range(16)
    ]


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM, cases: list[tuple[list[int], list[int], float]]) -> list[list[int]]:
    use_attention(model, "sdpa")
    answers = []
    for prompt, negative, scale in cases:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            guidance_scale=scale,
            negative_prompt_ids=torch.tensor([negative]) if negative else None,
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


SETUPS = [
    Setup(),
    Setup(rows=8, lag=1, chunk=16, blocks=22),
    Setup(rows=8, chunk=7, layout="padded", blocks=22, caching=False),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_guided_rows_are_those_of_generate(
    model: LlamaForCausalLM, cases: list[tuple[list[int], list[int], float]], expected: list[list[int]], setup: Setup
) -> None:
    """Guards the pair through chunks, preemption, lag and neighbours: each choice has the tokens of generate()."""
    engine = build(model, setup, BUILDERS)
    got = run(engine, [request(number, *case) for number, case in enumerate(cases)])
    for number, answer in enumerate(expected):
        for choice in (0, 1):
            mine = [id for output in got[number] if output.choice == choice for id in output.token_ids]
            assert mine == answer, (cases[number], choice)
    assert (engine.scheduler.stats.preemptions > 0) == (setup.blocks < 100)


def test_a_guided_row_goes_on_after_a_crash(
    model: LlamaForCausalLM, cases: list[tuple[list[int], list[int], float]], expected: list[list[int]]
) -> None:
    """Guards resumed streams: both rows begin with what was sent."""
    for number, (prompt, negative, scale) in enumerate(cases[:6]):
        sent = expected[number][:5]
        got = run(build(model, Setup(), BUILDERS), [request(number, prompt, negative, scale, sent)])[number]
        assert [id for output in got if output.choice == 1 for id in output.token_ids] == expected[number][5:]
