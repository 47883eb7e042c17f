"""Fields of the wire: ranges, defaults, refusals."""

import json
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import from_json

from ropeway.server.errors import ApiError
from ropeway.server.presets import DEFAULT_FILE, Presets
from ropeway.server.protocols.chat import ChatFields
from ropeway.server.sampling import output_limit, sampling_params
from ropeway.server.sampling_fields import MAX_LISTED_IDS, UNBUILT, SamplingFields, names_header

VOCAB = 2000


def params(body: dict[str, Any], config: dict[str, Any] | None = None, **options: Any) -> Any:
    facts: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_ids": frozenset({7}), "logprobs": None}
    fields = Presets({DEFAULT_FILE: config or {}}).fill(SamplingFields.parse(body))
    return sampling_params(fields, **(facts | options))


def refusal(body: dict[str, Any], **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        params(body, **options)
    error = caught.value
    assert error.status == 400 and error.code and "\n" not in error.message and error.message.endswith(".")
    return error


BAD: list[tuple[str, str]] = [
    ("temperature", "NaN"), ("temperature", "-1"), ("temperature", "2.1"), ("temperature", "1e308"),
    ("temperature", "true"), ("temperature", '"1"'), ("temperature", "[1]"), ("temperature", "Infinity"),
    ("top_p", "0"), ("top_p", "2"), ("top_p", "-0.1"), ("top_k", "-5"), ("top_k", "1.5"), ("top_k", "2147483648"),
    ("min_p", "1.1"), ("min_p", "-1"), ("repetition_penalty", "0"), ("repetition_penalty", "1e308"),
    ("frequency_penalty", "1e308"), ("presence_penalty", "-2.1"), ("presence_penalty", "NaN"),
    ("n", "0"), ("n", "1000000000"), ("n", "true"), ("n", "1.0"), ("n", '"1"'),
    ("max_tokens", "0"), ("max_tokens", "-1"), ("max_tokens", "1.5"), ("max_tokens", '"5"'), ("max_tokens", "true"),
    ("max_completion_tokens", "0"), ("min_tokens", "-1"), ("seed", str(2**64)), ("seed", str(2**63)), ("seed", "1.5"),
    ("seed", str(-(2**63) - 1)), ("seed", "9" * 400), ("stop", '""'), ("stop", '["a", ""]'), ("stop", "[1]"),
    ("stop", json.dumps(["a"] * 65)), ("stop", json.dumps("a" * 257)), ("stop", json.dumps(["a"] * 500_000)),
    ("stop_token_ids", "[-1]"), ("stop_token_ids", "[2000]"), ("stop_token_ids", str([2**63])),
    ("stop_token_ids", "[1.0]"), ("stop_token_ids", "5"), ("stop_token_ids", json.dumps([1] * (MAX_LISTED_IDS + 1))),
    ("allowed_token_ids", "[2000]"), ("allowed_token_ids", "[]"), ("allowed_token_ids", "[true]"),
    ("logit_bias", '{"2000": 1}'), ("logit_bias", '{"-1": 1}'), ("logit_bias", '{"01": 1}'), ("logit_bias", '{"x": 1}'),
    ("logit_bias", '{"1": 101}'), ("logit_bias", '{"1": NaN}'), ("logit_bias", '{"1": true}'), ("logit_bias", "[1]"),
    ("logit_bias", json.dumps({str(9**30): 1})), ("logit_bias", json.dumps({str(i): 1 for i in range(100_000)})),
    ("ignore_eos", "1"), ("stream", '"yes"'), ("stream_options", "true"), ("stream_options", '{"include_usage": 1}'),
    ("user", "5"), ("metadata", "[]"), ("cache_salt", '""'), ("priority", "4294967296"),
    ("priority", "-1"), ("skip_special_tokens", "0"), ("max_new_tokens", "0"), ("do_sample", "1"),
    ("eos_token_id", "-1"), ("eos_token_id", "2000"), ("eos_token_id", "[1, 2000]"), ("eos_token_id", "true"),
    ("eos_token_id", '"</s>"'), ("eos_token_id", str([1] * (MAX_LISTED_IDS + 1))), ("stop_strings", "5"),
    ("stop_strings", '[""]'), ("num_return_sequences", "0"), ("suppress_tokens", "[2000]"), ("max_length", "0"),
    ("truncate_prompt_tokens", "0"), ("max_time", "0"), ("max_time", "true"), ("truncate_prompt_tokens", "-2"),
    ("min_length", "-1"),
    ("typical_p", "0"), ("top_h", "1.1"), ("epsilon_cutoff", "1"), ("eta_cutoff", "-0.1"),
    ("no_repeat_ngram_size", "-1"),
    ("encoder_repetition_penalty", "0"), ("bad_words", '[""]'), ("bad_words", json.dumps(["a"] * 129)),
    ("bad_words_ids", "[[]]"), ("bad_words_ids", "[[2000]]"), ("bad_words_ids", "[5]"),
    ("bad_words_ids", json.dumps([[1] * 65])),
    ("sequence_bias", "[[[2000], 1]]"), ("sequence_bias", "[[[1], 1, 1]]"), ("sequence_bias", "[[[], 1]]"),
    ("sequence_bias", "[[1, 1]]"),
    ("sequence_bias", "[[[1], NaN]]"), ("sequence_bias", '[{"a": 1}]'), ("sequence_bias", json.dumps([[1]] * 100_000)),
    ("exponential_decay_length_penalty", "[1.5, 2]"), ("exponential_decay_length_penalty", "[1]"),
    ("exponential_decay_length_penalty", "[1, 0]"),
    ("begin_suppress_tokens", "[-1]"), ("forced_bos_token_id", "2000"), ("forced_eos_token_id", "[1, 2000]"),
    ("forced_eos_token_id", "true"),
    ("watermarking_config", '{"bias": 1e9}'), ("watermarking_config", '{"keys": [1]}'),
    ("watermarking_config", '{"context_width": 0}'),
    ("logits_processors", '[{"args": {}}]'), ("logits_processors", '[{"name": "a", "args": []}]'),
    ("logits_processors", '["a"]'),
    ("logits_processors", json.dumps([{"name": "a"}] * 17)), ("stopping_criteria", '[{"name": "", "args": {}}]'),
    ("generation_config", "5"), ("generation_config", '"{"'), ("generation_config", '"no-such-preset"'),
    ("generation_config", json.dumps("{" + " " * 2**16)),
    ("generation_config", json.dumps({str(i): i for i in range(2000)})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda text: text[:30])
def test_bad_values(name: str, value: str) -> None:
    """Guards the engine: no value outside of its range, and nothing of another type, ever gets there."""
    error = refusal({"stream": True, name: from_json(value)})
    assert error.param == name
    assert error.message.startswith(name)


GOOD: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_k": -1}, {"seed": 2**63 - 1}, {"seed": -(2**63)},
    {"stop": "x"}, {"stop": []}, {"stop": ["a", "b"]}, {"logit_bias": {"1999": -100, "0": 3}}, {"n": 128},
    {"stop_token_ids": [0, 1999]}, {"allowed_token_ids": [5]}, {"min_tokens": 3}, {"user": "", "metadata": {}},
]  # fmt: skip


@pytest.mark.parametrize("body", GOOD, ids=str)
def test_good_values(body: dict[str, Any]) -> None:
    """Guards against ranges that are too narrow: what the contract allows is taken."""
    params(body)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        (SamplingFields, "logit_bias", {str(key): "x" for key in range(10**5)}),
        (SamplingFields, "stop_token_ids", ["x"] * 10**5),
        (SamplingFields, "allowed_token_ids", ["x"] * 10**5),
        (SamplingFields, "stop", [1] * 10**5),
        (ChatFields, "messages", [1] * 10**5),
        (ChatFields, "tools", [1] * 10**5),
        (ChatFields, "messages", [{}] * 10_001),
        (ChatFields, "tools", [{}] * 1025),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_long_wrong_lists_are_one_error(fields: type[SamplingFields], name: str, value: Any) -> None:
    """Guards the event loop: an error per element took seconds and hundreds of megabytes."""
    body = {"messages": [{"role": "user", "content": "x"}]} if fields is ChatFields else {}
    with pytest.raises(ValidationError) as caught:
        fields.model_validate(body | {name: value})
    assert caught.value.error_count() <= 2
    with pytest.raises(ApiError) as refused:
        fields.parse(body | {name: value})
    assert refused.value.param == name


def test_null_means_absent() -> None:
    """Guards clients that send every field they know, with null for what they do not mean."""
    nulls = dict.fromkeys([*SamplingFields.model_fields, *UNBUILT, "whatever"])
    fields = SamplingFields.parse(nulls, strict=True)
    assert fields == SamplingFields() or fields.unknown() == []
    assert params(nulls | {"seed": 1}) == params({"seed": 1})


def test_defaults_in_order() -> None:
    """Guards precedence: request, then generation_config.json, then OpenAI's."""
    config = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "min_p": 0.05}
    plain = params({})
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p, plain.repetition_penalty) == (1, 1, 0, 0, 1)
    model = params({}, config)
    assert {name: getattr(model, name) for name in config} == config
    asked = params({"temperature": 0, "top_k": 0, "top_p": None}, config)
    assert (asked.temperature, asked.top_k, asked.top_p) == (0, 0, 0.95)
    assert params({}, {"do_sample": False, "temperature": 0.6}).temperature == 0
    assert params({}, {"temperature": "warm", "top_k": -7}) != params({}, config)


def test_temperatures_that_overflow_are_greedy() -> None:
    """Guards the sampler: logits divided by 1e-300 are infinite."""
    assert params({"temperature": 1e-300}).temperature == 0
    assert params({"temperature": 0.01}).temperature == 0.01


def test_seeds() -> None:
    """Guards repeatability: choice i of the whole answer uses seed + i, wrapping; without a seed none repeats."""
    assert params({"seed": 5}, first_index=3).seed == 8
    assert params({"seed": 2**63 - 1}, first_index=1).seed == -(2**63)
    drawn = {params({}).seed for _ in range(50)}
    assert len(drawn) == 50 and all(-(2**63) <= seed < 2**63 for seed in drawn)


def test_stop_tokens() -> None:
    """Guards the end: EOS ends a row unless the client ignores it, its own ids always do."""
    assert params({"stop_token_ids": [9, 3, 9]}).stop_token_ids == (3, 7, 9)
    assert params({"stop_token_ids": [9], "ignore_eos": True}).stop_token_ids == (9,)
    assert params({"ignore_eos": True}).stop_token_ids == ()
    assert params({}, eos_token_ids=frozenset({7, VOCAB, -1})).stop_token_ids == (7,)


def test_every_token_banned() -> None:
    """Guards the sampler against choosing from nothing."""
    assert refusal({"allowed_token_ids": [7], "min_tokens": 1}).param == "allowed_token_ids"
    assert refusal({"allowed_token_ids": [5], "logit_bias": {"5": -100}}).param == "allowed_token_ids"
    params({"allowed_token_ids": [7]})
    params({"allowed_token_ids": [7, 8], "min_tokens": 1})
    everything = {str(id): -100 for id in range(8)}
    assert refusal({"logit_bias": everything}, vocab_size=8).param == "logit_bias"
    assert refusal({"logit_bias": {}, "stop_token_ids": list(range(8)), "min_tokens": 1}, vocab_size=8).status == 400


@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt_fields(name: str) -> None:
    """Guards against silence: a field of the contract that is not built yet is refused by name; what asks for nothing
    passes, also with --strict."""
    error = refusal({name: {"some": "thing"}})
    assert error.param == name and error.message.startswith(name)
    for harmless in (*UNBUILT[name], None, [], {}):
        SamplingFields.parse({name: harmless}, strict=True)


def test_best_of() -> None:
    """Guards a default that old clients send: best_of equal to n changes nothing."""
    SamplingFields.parse({"best_of": 1})
    SamplingFields.parse({"best_of": 3, "n": 3})
    assert refusal({"best_of": 3, "n": 2}).param == "best_of"


def test_unknown_fields() -> None:
    """Guards both ways with a typo: named in a header, or refused with --strict."""
    body = {"temprature": 0.1, "x": None, "stream": True, "stream_options": {"include_obfuscation": False}}
    assert SamplingFields.parse(body).unknown() == ["temprature", "stream_options.include_obfuscation"]
    with pytest.raises(ApiError) as caught:
        SamplingFields.parse(body, strict=True)
    assert caught.value.param == "temprature" and "temprature" in caught.value.message


def test_names_in_a_header() -> None:
    """Guards the response head: a field's name is any text, a header's value is not."""
    names = ["a b", "x\r\nSet-Cookie: y", "日本", "n" * 500] + [f"f{i}" for i in range(100)]
    value = names_header(names)
    assert value.isascii() and value.isprintable() and "\r" not in value and len(value) < 2000
    assert names_header(["a.b", "c"]) == "a.b, c" and value.endswith("...")


def test_bodies_that_are_no_objects() -> None:
    """Guards the first byte: a list or a string is a 400."""
    for body in ([], "x", 5, None):
        with pytest.raises(ApiError) as caught:
            SamplingFields.parse(body)
        assert caught.value.status == 400 and caught.value.param is None


def test_stream_options_need_a_stream() -> None:
    """Guards against options that would do nothing."""
    assert refusal({"stream_options": {"include_usage": True}}).param == "stream_options"


def limit(body: dict[str, Any], prompt: int = 10, context: int = 100, default: int | None = None) -> int:
    return output_limit(SamplingFields.parse(body), prompt, context, default)


def test_output_limits() -> None:
    """Guards max_tokens: both names, the smaller wins; absent is the rest of the context, or a default that fits."""
    assert limit({"max_tokens": 20, "max_completion_tokens": 30}) == 20
    assert limit({"max_tokens": 30, "max_completion_tokens": 20}) == 20
    assert limit({"max_completion_tokens": 90}) == 90
    assert limit({}) == 90
    assert limit({}, default=16) == 16
    assert limit({}, prompt=95, default=16) == 5
    assert limit({"min_tokens": 90}) == 90


@pytest.mark.parametrize(
    ("body", "prompt", "numbers"),
    [
        ({"max_tokens": 91}, 10, (101, 10, 91)),
        ({}, 100, (101, 100, 1)),
        ({"max_tokens": 10**12}, 5, (5 + 10**12, 5, 10**12)),
    ],
)
def test_context_errors(body: dict[str, Any], prompt: int, numbers: tuple[int, int, int]) -> None:
    """Guards the sentence that client libraries parse to shorten their prompts."""
    with pytest.raises(ApiError) as caught:
        limit(body, prompt)
    total, prompt_tokens, output = numbers
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.message.startswith(
        f"This model's maximum context length is 100 tokens. However, you requested {total} tokens "
        f"({prompt_tokens} in the messages, {output} in the completion). "
    )


def test_min_tokens_beyond_the_limit() -> None:
    """Guards rows that could never end well."""
    with pytest.raises(ApiError) as caught:
        limit({"min_tokens": 6, "max_tokens": 5})
    assert caught.value.param == "min_tokens"
