"""Loglikelihoods as lm-evaluation-harness asks for them (its `local-completions`), against transformers' own logits."""

from operator import itemgetter
from typing import Any

import pytest
import torch
from harness import Reference, RunningServer

PAIRS = [
    ("A sequence of numbers: 1, 2,", " 3, 4, 5"),
    ("A sequence of numbers: 1, 2,", " 7, banana"),
    ("I am a", " cat."),
    ("Who are you? " * 30, "I am the demo model."),
]
"""(context, continuation), as a task of multiple choice has them."""


def by_transformers(reference: Reference, ids: list[int], context: int) -> tuple[float, bool]:
    """The sum of the continuation's logprobs, and whether it is the greedy one."""
    with torch.inference_mode():
        logprobs = reference.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    own = logprobs[range(len(ids) - 1), ids[1:]][context - 1 :]
    return float(own.sum()), bool((own == logprobs[context - 1 :].amax(-1)).all())


def by_the_harness(answer: dict[str, Any], contexts: list[int], end: int | None) -> list[tuple[float, bool]]:
    """As the harness reads an answer: the continuation's part of each choice's lists, up to the generated token."""
    results = []
    for choice, context in zip(sorted(answer["choices"], key=itemgetter("index")), contexts, strict=True):
        own = choice["logprobs"]["token_logprobs"][context:end]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][context:end]]
        results.append((sum(own), own == best))
    return results


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_a_batch_of_token_ids(server: RunningServer, reference: Reference, max_tokens: int) -> None:
    """Guards evaluations: sums and greediness of every continuation are those of the model, in whatever batch."""
    encode = reference.tokenizer.encode
    contexts = [len(encode(context)) for context, _ in PAIRS]
    prompts = [encode(context) + encode(rest, add_special_tokens=False) for context, rest in PAIRS]
    answer = server.post(
        "/v1/completions",
        **{"prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True},
    )
    assert answer.status_code == 200, answer.text
    results = by_the_harness(answer.json(), contexts, -1 if max_tokens else None)
    for (total, greedy), prompt, context in zip(results, prompts, contexts, strict=True):
        expected, expected_greedy = by_transformers(reference, prompt, context)
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    assert {greedy for _, greedy in results} == {True, False}
    assert answer.json()["usage"]["completion_tokens"] == max_tokens * len(PAIRS)


def test_the_openai_sdk(server: RunningServer) -> None:
    """Guards the SDK's users: echo with logprobs comes through its types, and vLLM's list beside them."""
    answer = server.openai().completions.create(
        model="", prompt="I am a cat.", echo=True, logprobs=2, max_tokens=3, extra_body={"prompt_logprobs": 1}
    )
    (choice,) = answer.choices
    assert choice.text.startswith("I am a cat.") and choice.logprobs is not None
    logprobs, prompt = choice.logprobs.token_logprobs, choice.model_extra["prompt_logprobs"]
    assert logprobs[0] is None and len(logprobs) == len(prompt) + answer.usage.completion_tokens
    for logprob, by_id in zip(logprobs[1:], prompt[1:], strict=False):
        assert logprob == next(iter(by_id.values()))["logprob"]
