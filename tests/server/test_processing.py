"""Options that edit scores: from a body's fields to a row of the real engine, against transformers' `generate()`."""

import random
from typing import Any

import pytest
import torch
from fake_client import model_info
from test_same_tokens import VOCAB, Setup, build, model
from transformers import GenerationConfig, LlamaForCausalLM

from ropeway.kernels.forward import use_attention
from ropeway.kernels.sampler import Sampler
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowState
from ropeway.scheduler.messages import AddRequest, ChoiceStart, EditSpec
from ropeway.scheduler.processors import PROCESSORS, ProcessorBuilder, Registry
from ropeway.scheduler.row import rows_of
from ropeway.server.errors import ApiError
from ropeway.server.presets import Presets
from ropeway.server.processing import KIND, processing
from ropeway.server.sampling import sampling_params
from ropeway.server.sampling_fields import SamplingFields

__all__ = ["model"]  # the fixture

EOS = 5
TOKENS = 14
BUILDER = ProcessorBuilder(Registry.installed(), None, VOCAB, "cpu")
VALUES: dict[str, tuple[Any, ...]] = {
    "sequence_bias": ([[[7], 4.0], [[3, 9], -6.0], [[2, 1], 2.5]],),
    "encoder_repetition_penalty": (1.4, 0.7),
    "repetition_penalty": (1.3, 0.8),
    "no_repeat_ngram_size": (1, 2, 3),
    "encoder_no_repeat_ngram_size": (2, 3),
    "bad_words_ids": ([[11], [3, 4], [EOS]], [[60, 61], [62], [63]]),
    "min_new_tokens": (2, 6),
    "min_length": (9, 12),
    "forced_bos_token_id": (17,),
    "forced_eos_token_id": (EOS, [EOS, 8]),
    "exponential_decay_length_penalty": ([2, 1.3], [0, 2]),
    "suppress_tokens": ([20, 21, 22],),
    "begin_suppress_tokens": (list(range(30, 60)),),
    "watermarking_config": ({"bias": 3.0}, {"seeding_scheme": "selfhash", "greenlist_ratio": 0.5}),
    "renormalize_logits": (True,),
}
WARPERS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.6, 1.7),
    "top_k": (5, 30),
    "top_p": (0.5, 0.9),
    "min_p": (0.02, 0.2),
    "typical_p": (0.3, 0.8),
    "top_h": (0.4, 0.8),
    "epsilon_cutoff": (0.01,),
    "eta_cutoff": (0.02,),
}


def combinations(seed: int, tables: dict[str, tuple[Any, ...]], count: int) -> list[dict[str, Any]]:
    """Each option alone, then random ones together; not a banned EOS that gets likelier, which is NaN there."""
    pick = random.Random(seed)
    alone = [{name: value} for name, values in tables.items() for value in values]
    share = 4 / len(tables)
    mixed = [
        {name: pick.choice(values) for name, values in tables.items() if pick.random() < share} for _ in range(count)
    ]
    for options in mixed:
        if "exponential_decay_length_penalty" in options:
            options.pop("min_length", None), options.pop("min_new_tokens", None)
    return alone + mixed


def request(options: dict[str, Any], prompt: list[int], **body: Any) -> AddRequest:
    fields = Presets({}).fill(SamplingFields.parse(options | body))
    params = sampling_params(
        fields,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
        logprobs=None,
        prompt_tokens=len(prompt),
        seed=0,
    )
    facts = model_info(vocab_size=VOCAB, logits_processors=sorted(BUILDER._registry.logits_processors))
    params, edits = processing(fields, params, facts)
    return AddRequest(1, 1, prompt, params, TOKENS, [ChoiceStart(0)], edits=edits)


def reference_config(options: dict[str, Any], **more: Any) -> GenerationConfig:
    return GenerationConfig(**options, **more, max_new_tokens=TOKENS, eos_token_id=EOS, pad_token_id=0)


@pytest.fixture(scope="module")
def greedy_prompts() -> list[list[int]]:
    pick = random.Random(3)
    return [[pick.randrange(VOCAB) for _ in range(length)] for length in (1, 6, 13)]


def test_greedy_rows_are_those_of_generate(model: LlamaForCausalLM, greedy_prompts: list[list[int]]) -> None:
    """Guards every option's meaning, order and arguments: alone and together, token by token, all in one batch."""
    combos = combinations(1, VALUES, 60)
    asked = [(options, greedy_prompts[place % 3]) for place, options in enumerate(combos)]
    use_attention(model, "sdpa")
    expected = []
    plain = model.generate(torch.tensor([greedy_prompts[1]]), generation_config=reference_config({}, do_sample=False))
    for options, prompt in asked:
        ids = torch.tensor([prompt])
        out = model.generate(ids, generation_config=reference_config(options, do_sample=False))
        expected.append(out[0, len(prompt) :].tolist())
    engine = build(model, Setup(rows=16), {PROCESSORS: BUILDER})
    for number, (options, prompt) in enumerate(asked):
        made = request(options, prompt, temperature=0)
        engine.add(0, AddRequest(1, number, prompt, made.sampling, TOKENS, [ChoiceStart(0)], edits=made.edits))
    got: dict[int, list[int]] = {number: [] for number in range(len(asked))}
    while engine.has_work:
        for output in engine.step(0.0).get(0, []):
            assert output.error is None, (asked[output.request_id], output.error)
            got[output.request_id] += output.token_ids
    wrong = [asked[number] for number in got if got[number] != expected[number]]
    assert not wrong
    assert sum(one != plain[0, 6:].tolist() for one in expected) > 30


def our_probabilities(made: AddRequest, output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What the sampler draws the next token from, [V]."""
    (row,) = rows_of(made, 0, 1000)
    sampler = Sampler(SamplingState(1, VOCAB, torch.device("cpu")))
    sampler.state.join([RowState(0, made.sampling, made.prompt_ids, output)])
    slots, needs = torch.tensor([0]), [sampler._needs(0)]
    position = len(made.prompt_ids) + len(output)
    scores = sampler._processed(logits.clone(), slots, needs, [position]).clone()
    for spec in made.edits:
        BUILDER(spec.args, row).edit(made.prompt_ids + output, scores[0])
    scores = (scores - scores.amax(-1, keepdim=True)) / sampler.state.temperature[slots].unsqueeze(1)
    ids = torch.arange(VOCAB).unsqueeze(0)
    if needs[0].filtered:
        scores, ids = sampler._filter(scores, ids, slots, needs)
    return torch.zeros(1, VOCAB).scatter_add_(1, ids.expand_as(scores), scores.softmax(-1))[0]


def test_sampled_rows_draw_from_the_same_tokens(model: LlamaForCausalLM) -> None:
    """Guards the support and the distribution of sampling: by the scores that are drawn from, not by draws."""
    pick = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    tables = VALUES | WARPERS
    for options in combinations(2, WARPERS, 25) + combinations(3, tables, 60):
        for length, outputs in ((1, 0), (1, 3), (8, 0), (8, 5), (8, TOKENS - 1)):
            prompt = [pick.randrange(VOCAB) for _ in range(length)]
            output = [pick.choice([*range(6, 12), *prompt]) for _ in range(outputs)]
            logits = torch.randn(1, VOCAB, generator=generator) * 3
            config = reference_config(options, do_sample=True)
            config.max_length = length + TOKENS
            model._prepare_special_tokens(config, device="cpu")
            ids = torch.tensor([prompt + output])
            processors = model._get_logits_processor(config, length, ids[:, :length], device="cpu")
            expected = processors(ids, logits.clone()).softmax(-1)[0]
            got = our_probabilities(request({"temperature": 1.0} | options, prompt), output, logits)
            assert ((got > 0) == (expected > 0)).all(), options
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_decay_that_has_outgrown_all_numbers() -> None:
    """Guards long rows: an EOS that min_tokens bans stays banned, and a power too large for a float ends the row."""
    options = {"exponential_decay_length_penalty": [0, 100], "min_new_tokens": 3}
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    assert our_probabilities(request(options, [1, 2]), [3, 4], logits)[EOS] == 0
    for outputs in (4, 20, 400):
        assert our_probabilities(request(options, [1, 2]), [3] * outputs, logits + 1)[EOS] == 1


def test_what_the_sampler_keeps() -> None:
    """Guards speed: an option that commutes with the sampler's own leaves them where they are fast."""
    made = request({"no_repeat_ngram_size": 2, "top_k": 5, "temperature": 0.5, "repetition_penalty": 1.2}, [1])
    assert (made.sampling.top_k, made.sampling.temperature, made.sampling.repetition_penalty) == (5, 0.5, 1.2)
    assert made.edits[0].args["options"] == {"no_repeat_ngram_size": 2}
    made = request({"typical_p": 0.5, "top_k": 5, "temperature": 0.5, "repetition_penalty": 1.2}, [1])
    assert (made.sampling.top_k, made.sampling.temperature, made.sampling.repetition_penalty) == (0, 1, 1.2)
    assert made.edits[0].args["options"] == {"typical_p": 0.5, "temperature": 0.5, "top_k": 5}
    assert request({"typical_p": 1, "no_repeat_ngram_size": 0, "bad_words": []}, [1]).edits == []
    assert request({"typical_p": 0.5}, [1], do_sample=False).edits == []
    assert KIND == PROCESSORS


def test_options_of_a_sampled_row_mean_sampling() -> None:
    """Guards presets: a shape of sampling without do_sample asks for it."""
    fields = Presets({}).fill(SamplingFields.parse({"typical_p": 0.9}), samples=False)
    assert fields.do_sample is True


@pytest.mark.parametrize("param", ["logits_processors", "stopping_criteria"])
def test_unknown_names(param: str) -> None:
    """Guards the client's search: a name that is not there is refused with those that are."""
    fields = SamplingFields.parse({param: [{"name": "nothing", "args": {}}]})
    with pytest.raises(ApiError, match=r"there is a, b") as caught:
        processing(fields, SamplingParams(), model_info(**{param: ["a", "b"]}))
    assert (caught.value.status, caught.value.param) == (400, param)
    _, edits = processing(fields, SamplingParams(), model_info(**{param: ["nothing"]}))
    named = [{"name": "nothing", "args": {}}]
    args = {"options": {}, "logits_processors": [], "stopping_criteria": []} | {param: named}
    assert edits == [EditSpec(PROCESSORS, args)]


def test_stop_strings_of_guided_rows_wait() -> None:
    """Guards min_tokens: a guided row's moved to the engine whole, and stop strings ended it before."""
    fields = Presets({}).fill(SamplingFields.parse({"guidance_scale": 2, "min_tokens": 3}))
    given = sampling_params(fields, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}), logprobs=None)
    params, _ = processing(fields, given, model_info())
    assert params.min_tokens == 3
