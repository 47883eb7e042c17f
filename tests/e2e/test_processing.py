"""Options, processors and criteria over HTTP, on the real server: as generate(), and errors that are one request's."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import torch
from harness import Reference, RunningServer
from openai_app import check
from transformers import GenerationConfig

from ropeway.server.sampling_fields import SamplingFields

PROMPT = "A sequence of numbers: 1, 2"


def complete(server: RunningServer, **fields: object) -> dict[str, Any]:
    answer = server.post("/v1/completions", prompt=PROMPT, temperature=0, **({"max_tokens": 16} | fields))
    assert answer.status_code == 200, answer.text
    return dict(check(answer.json(), "CreateCompletionResponse")["choices"][0])


def table(reference: Reference) -> dict[str, Any]:
    """Options of greedy rows -> a value with which the answer is another one. Its tokens: ", 3, 4" and so on."""
    prompt, answer = (reference.tokenizer(text)["input_ids"] for text in (PROMPT, ", 3, 4, 5, 6, 7"))
    third, fourth = (reference.tokenizer(text)["input_ids"][-1] for text in (", 3", ", 4"))
    return {
        "bad_words_ids": [answer[:3], [fourth]],
        "begin_suppress_tokens": [answer[0]],
        "encoder_no_repeat_ngram_size": 1,
        "encoder_repetition_penalty": 0.05,
        "eos_token_id": [fourth, 2],
        "exponential_decay_length_penalty": [2, 1.5],
        "forced_eos_token_id": third,
        "max_length": len(prompt) + 7,
        "max_new_tokens": 5,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 8.0,
        "sequence_bias": [[answer[1:3], -20.0], [[fourth], 3.0]],
        "stop_strings": ["nothing", ", 5"],
        "suppress_tokens": [third, fourth],
        "watermarking_config": {"bias": 30.0},
    }


ELSEWHERE = (
    {
        "do_sample": "tests/e2e/test_guide.py",
        "forced_bos_token_id": "tests/server/test_processing.py",
        "max_time": "tests/e2e/test_presets.py",
        "min_length": "tests/server/test_processing.py",
        "min_new_tokens": "tests/server/test_processing.py",
        "num_return_sequences": "tests/e2e/test_combinations.py",
    }
    | dict.fromkeys(
        ["num_beams", "length_penalty", "early_stopping", "renormalize_logits", "guidance_scale"],
        "tests/scheduler/test_beam.py",
    )
    | dict.fromkeys(
        ["temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"],
        "tests/server/test_processing.py",
    )
)
"""Request fields that no greedy answer of this model shows -> where they are compared with transformers."""


def watermarked(reference: Reference, config: dict[str, Any]) -> str:
    """On the server's kind of device: whose random numbers the green list is."""
    cpu = reference.model
    on_device = Reference(deepcopy(cpu).cuda() if torch.cuda.is_available() else cpu, reference.tokenizer)
    return on_device.text(PROMPT, 16, watermarking_config=config)


def test_options(server: RunningServer, reference: Reference) -> None:
    """Guards the whole way of every option, in the body and in its generation_config, through a batch of all."""
    options = table(reference)
    own = set(GenerationConfig().to_dict()) & SamplingFields.model_fields.keys()
    assert own <= options.keys() | ELSEWHERE.keys(), "each request field of GenerationConfig is compared somewhere"
    plain = reference.text(PROMPT, 16)
    lengths: dict[str, Any] = {"max_length": {"max_tokens": None}, "max_new_tokens": {"max_tokens": None}}
    expected = {}
    for name, value in options.items():
        more = {"tokenizer": reference.tokenizer} if name == "stop_strings" else {}
        if name == "max_length":
            expected[name] = reference.text(PROMPT, 7)
        elif name == "watermarking_config":
            expected[name] = watermarked(reference, value)
        elif name == "max_new_tokens":
            expected[name] = reference.text(PROMPT, value)
        else:
            expected[name] = reference.text(PROMPT, 16, **{name: value}, **more)

    def ours(name: str, inside: bool) -> str:
        given = {name: options[name]}
        fields = lengths.get(name, {}) | ({"generation_config": given} if inside else given)
        return str(complete(server, include_stop_str_in_output=True, **fields)["text"])

    with ThreadPoolExecutor(8) as threads:
        for inside in (False, True):
            texts = threads.map(ours, options, [inside] * len(options))
            assert dict(zip(options, texts, strict=True)) == expected
    assert [name for name, text in expected.items() if text == plain] == []


def test_options_together(server: RunningServer, reference: Reference) -> None:
    """Guards their order over HTTP; all the combinations are compared in tests/server/test_processing.py."""
    options = {"encoder_repetition_penalty": 0.5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    assert complete(server, **options)["text"] == reference.text(PROMPT, 16, **options)


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
