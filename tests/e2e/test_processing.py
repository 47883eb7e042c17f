"""Options, processors and criteria over HTTP, on the real server: as generate(), and errors that are one request's."""

from typing import Any

import pytest
from harness import Reference, RunningServer
from openai_app import check

PROMPT = "A sequence of numbers: 1, 2"


def complete(server: RunningServer, **fields: object) -> dict[str, Any]:
    answer = server.post("/v1/completions", prompt=PROMPT, temperature=0, **({"max_tokens": 16} | fields))
    assert answer.status_code == 200, answer.text
    return dict(check(answer.json(), "CreateCompletionResponse")["choices"][0])


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 0.5, "repetition_penalty": 1.2},
        {"exponential_decay_length_penalty": [2, 1.5]},
        {"watermarking_config": {"bias": 6.0}},
    ],
    ids=str,
)
def test_options(server: RunningServer, reference: Reference, options: dict[str, Any]) -> None:
    """Guards the whole way of an option, in the body and in its generation_config."""
    expected = reference.text(PROMPT, 16, **options)
    assert complete(server, **options)["text"] == complete(server, generation_config=options)["text"] == expected


def test_bad_words(server: RunningServer) -> None:
    """Guards vLLM's texts: the word that would have come next does not."""
    word = complete(server)["text"].split()[0]
    assert word not in complete(server, bad_words=[word])["text"].split()[:1]


def test_processors_and_criteria_by_name(server: RunningServer) -> None:
    """Guards names on their way to the engine and back: arguments arrive, the criterion is told as stop_reason."""
    plain = complete(server)
    forced = [{"name": "SuppressTokensLogitsProcessor", "args": {"suppress_tokens": list(range(3, 200))}}]
    assert complete(server, logits_processors=forced)["text"] != plain["text"]
    length = len(server.post("/tokenize", prompt=PROMPT).json()["tokens"]) + 4
    ends = [{"name": "MaxLengthCriteria", "args": {"max_length": length}}]
    stopped = complete(server, stopping_criteria=ends)
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "MaxLengthCriteria")
    assert stopped["text"] == complete(server, max_tokens=4)["text"]


def test_errors(server: RunningServer) -> None:
    """Guards status and sentence: an unknown name is the client's, what a processor raises is a 500 of its request."""
    unknown = server.post("/v1/completions", prompt=PROMPT, logits_processors=[{"name": "nothing"}])
    assert unknown.status_code == 400 and "TopKLogitsWarper" in unknown.json()["error"]["message"]
    args = {"bad_words_ids": [[10**6]]}
    raises = [{"name": "NoBadWordsLogitsProcessor", "args": args}]
    failed = server.post("/v1/completions", prompt=PROMPT, logits_processors=raises)
    error = failed.json()["error"]
    assert (failed.status_code, error["code"]) == (500, "engine_error")
    assert error["message"].startswith("The logits processor NoBadWordsLogitsProcessor failed: ValueError")
    for args, words in (
        ({}, "TopKLogitsWarper has other arguments: missing a required argument: 'top_k'."),
        (
            {"top_k": 3, "colour": 1},
            "TopKLogitsWarper has other arguments: got an unexpected keyword argument 'colour'.",
        ),
        ({"top_k": -3}, "TopKLogitsWarper refused its arguments top_k: ValueError"),
    ):
        wrong = [{"name": "TopKLogitsWarper", "args": args}]
        refused = server.post("/v1/completions", prompt=PROMPT, logits_processors=wrong)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"], refused.text


def test_nothing_left(server: RunningServer) -> None:
    """Guards bans that leave nothing: a sentence about the request, not a 500 that blames the model."""
    body = {"prompt": PROMPT, "structured_outputs": {"regex": "1{20}"}, "no_repeat_ngram_size": 2, "max_tokens": 30}
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == 400 and "left no token" in answer.json()["error"]["message"], answer.text
    assert server.metrics().total("ropeway_requests_total", outcome="rejected") > 0
    assert complete(server)["text"]
