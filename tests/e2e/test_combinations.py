"""Pairs of request features, all of them, on a real server: no 5xx, answers that OpenAI's schema accepts and that do$
each feature says, streams that say the same.

A row that holds a pair which cannot be done would hide what else is wrong with it, so those pairs are named here, and
each is a 400 with a sentence.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from harness import RunningServer
from openai_app import check, check_documents
from pairs import Pair, every_pair, rows
from wire import events

Features = Mapping[str, Mapping[str, dict[str, Any]]]
"""Feature -> name of a value -> fields of the body. The first value does nothing."""

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
TOOLS = {"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}
REGEX = "[a-z]{2,4}"
CHOICES = ["red", "redder", "blue"]
GRAMMAR = 'start: "yes" | "no"'
COOLER = {"name": "TemperatureLogitsWarper", "args": {"temperature": 0.9}}
LONGER = {"name": "MinLengthLogitsProcessor", "args": {"min_length": 2, "eos_token_id": 2}}
SHORT = {"name": "MaxLengthCriteria", "args": {"max_length": 60}}
BUDGET = {"reasoning_effort": "low", "thinking_budget": 4}
NOTHING: dict[str, dict[str, Any]] = {"absent": {}}

SAMPLING: Features = {
    "mode": {
        "greedy": {"temperature": 0},
        "seeded": {"seed": 7},
        "hot": {"temperature": 2, "seed": -(2**63)},
        "do_sample false": {"do_sample": False},
    },
    "max_tokens": {"24": {"max_tokens": 24}, "1": {"max_tokens": 1}, "64": {"max_tokens": 64}},
    "n": NOTHING | {"2": {"n": 2}, "num_return_sequences 3": {"num_return_sequences": 3}},
    "stop": NOTHING | {"text": {"stop": "e"}, "kept": {"stop": [" the", "a"], "include_stop_str_in_output": True}},
    "frequency": NOTHING | {"2": {"frequency_penalty": 2}, "-2": {"frequency_penalty": -2}},
    "presence": NOTHING | {"1.5": {"presence_penalty": 1.5}},
    "repetition": NOTHING | {"1.3": {"repetition_penalty": 1.3}, "encoder": {"encoder_repetition_penalty": 0.8}},
    "no_repeat": NOTHING | {"3": {"no_repeat_ngram_size": 3}, "encoder": {"encoder_no_repeat_ngram_size": 12}},
    "logit_bias": NOTHING | {"ban": {"logit_bias": {"270": -100}}, "wish": {"logit_bias": {"300": 8, "2": 1}}},
    "bad_words": NOTHING | {"text": {"bad_words": ["am"]}, "ids": {"bad_words_ids": [[300, 301], [302]]}},
    "bias": NOTHING | {"sequence": {"sequence_bias": [[[300], 2.0], [[301, 302], -3.0]]}},
    "shape": NOTHING | {"top": {"top_k": 20, "top_p": 0.9}, "min_p": {"min_p": 0.05}, "typical": {"typical_p": 0.8}},
    "cutoff": NOTHING | {"epsilon": {"epsilon_cutoff": 0.01}, "eta": {"eta_cutoff": 0.01}, "top_h": {"top_h": 0.5}},
    "ends": NOTHING
    | {
        "ignore_eos": {"ignore_eos": True},
        "min_tokens": {"min_tokens": 1},
        "eos_token_id": {"eos_token_id": [2, 300]},
        "stop_token_ids": {"stop_token_ids": [301]},
        "decay": {"exponential_decay_length_penalty": [4, 1.5]},
        "forced": {"forced_eos_token_id": 2},
    },
    "suppress": NOTHING | {"always": {"suppress_tokens": [305]}, "first": {"begin_suppress_tokens": [305, 306]}},
    "watermark": NOTHING | {"on": {"watermarking_config": {"bias": 1.5}}},
    "processors": NOTHING | {"two": {"logits_processors": [COOLER, LONGER]}},
    "criteria": NOTHING | {"length": {"stopping_criteria": [SHORT]}, "time": {"max_time": 1000}},
    "preset": NOTHING | {"object": {"generation_config": {"top_k": 9}}, "json": {"generation_config": '{"top_k": 9}'}},
    "text": NOTHING | {"special": {"skip_special_tokens": False}},
    "ids": NOTHING | {"returned": {"return_token_ids": True}},
    "usage": NOTHING
    | {
        "asked": {"stream_options": {"include_usage": True}},
        "always": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    },
    "cut": NOTHING | {"30": {"truncate_prompt_tokens": 30}},
    "tenant": NOTHING | {"salt": {"cache_salt": "s", "user": "u", "priority": 3}},
    "search": NOTHING
    | {
        "beams": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        "guided": {"guidance_scale": 1.5, "negative_prompt": "A cat."},
    },
    "format": NOTHING
    | {
        "text": {"response_format": {"type": "text"}},
        "json_object": {"response_format": {"type": "json_object"}},
        "json_schema": {"response_format": SCHEMA},
        "json": {"structured_outputs": {"json": CITY, "whitespace_pattern": " ?"}},
        "regex": {"structured_outputs": {"regex": REGEX}},
        "choice": {"structured_outputs": {"choice": CHOICES}},
        "grammar": {"guided_grammar": GRAMMAR},
        "closed": {"response_format": SCHEMA, "json_close_on_length": True},
    },
}
"""What both routes have."""
CHAT: Features = SAMPLING | {
    "question": {
        "who": {"messages": [{"role": "user", "content": "Who are you?"}]},
        "sum": {"messages": [{"role": "user", "content": "What is 17 + 26?"}]},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "The weather in Paris?"}]}]},
    },
    "logprobs": NOTHING | {"own": {"logprobs": True}, "top": {"logprobs": True, "top_logprobs": 3}},
    "tools": NOTHING
    | {
        "auto": TOOLS,
        "none": TOOLS | {"tool_choice": "none"},
        "required": TOOLS | {"tool_choice": "required"},
        "named": TOOLS | {"tool_choice": NAMED},
        "one": TOOLS | {"parallel_tool_calls": False},
    },
    "thoughts": NOTHING | {"low": {"reasoning_effort": "low"}, "none": {"reasoning_effort": "none"}, "cut": BUDGET},
    "prompt": NOTHING | {"bare": {"add_generation_prompt": False}},
    "prompt_logprobs": NOTHING | {"2": {"prompt_logprobs": 2}},
}
COMPLETIONS: Features = SAMPLING | {
    "prompt": {
        "text": {"prompt": "A sequence of numbers: 1, 2"},
        "ids": {"prompt": [300, 301, 302]},
        "two": {"prompt": ["A, B, C", "I am a cat."]},
    },
    "logprobs": NOTHING | {"own": {"logprobs": 0}, "top": {"logprobs": 3}},
    "echo": NOTHING | {"on": {"echo": True}},
    "prompt_logprobs": NOTHING | {"1": {"prompt_logprobs": 1}},
}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


def together(name: str, value: str, other: str, values: Iterable[str]) -> set[Pair]:
    return {frozenset([(name, value), (other, one)]) for one in values}


BANS = together("no_repeat", "3", "format", SAMPLING["format"].keys() - {"absent", "text"})
BANS |= together("no_repeat", "3", "tools", ["required", "named"])
BANS |= together("no_repeat", "encoder", "tools", ["required", "named"])  # the prompt shows what calls look like
FOLLOWS = together("search", "beams", "format", SAMPLING["format"].keys() - {"absent", "text"})
FOLLOWS |= together("search", "beams", "tools", ["required", "named", "one"])
FOLLOWS |= together("search", "beams", "thoughts", ["cut"])
PENALTIES = together("search", "beams", "frequency", ["2", "-2"]) | together("search", "beams", "presence", ["1.5"])
PENALTIES |= together("search", "guided", "frequency", ["2", "-2"]) | together("search", "guided", "presence", ["1.5"])
SCORES = {pair for search in ("beams", "guided") for pair in together("search", search, "prompt_logprobs", ["1", "2"])}
SCORES |= together("search", "guided", "echo", ["on"])  # with logprobs, that is
HARD = (
    dict.fromkeys(BANS, "left no token to go on with")
    | dict.fromkeys(together("max_tokens", "1", "format", ["closed"]), "max_tokens")
    | dict.fromkeys(FOLLOWS, "A beam search cannot follow a grammar")
    | dict.fromkeys(SCORES, "Logprobs of the prompt cannot be had")
    | dict.fromkeys(PENALTIES, "must be 0 with")
    | dict.fromkeys(together("search", "beams", "logprobs", ["own", "top"]), "logprobs must be absent")
)
"""What cannot always be done -> what the refusal says."""


def body(features: Features, row: Mapping[str, str]) -> dict[str, Any]:
    return {field: value for name, choice in row.items() for field, value in features[name][choice].items()}


def described(document: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's description has it, which forgets that an echo's first token has no logprob: its API says null."""
    for choice in document.get("choices", []):
        given = choice.get("logprobs") or {}
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if given.get(name) and given[name][0] is None:
                given[name][0] = nothing
    return document


def streamed(answer: httpx.Response) -> dict[int, dict[str, Any]]:
    """Index -> what a stream's pieces say together."""
    told: dict[int, dict[str, Any]] = {}
    documents = [described(document) for document in events(answer.content)]
    assert "error" not in documents[-1], documents[-1]
    chat = documents[0]["object"] == "chat.completion.chunk"
    check_documents(documents, "CreateChatCompletionStreamResponse" if chat else "CreateCompletionResponse")
    for document in documents:
        for choice in document["choices"]:
            one = told.setdefault(choice["index"], {"text": "", "thoughts": "", "calls": [], "logprobs": 0})
            delta = choice.get("delta", choice)
            one["text"] += delta.get("text") or delta.get("content") or ""
            one["thoughts"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or []:
                if "name" in call["function"]:
                    one["calls"].append([call["function"]["name"], ""])
                one["calls"][call["index"]][1] += call["function"]["arguments"]
            one["logprobs"] += positions(choice)
            if choice["finish_reason"] is not None:
                one["end"] = [choice["finish_reason"], choice.get("stop_reason")]
    return told


def whole(answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of a whole answer."""
    told = {}
    for choice in answer["choices"]:
        message = choice.get("message", {})
        told[choice["index"]] = {
            "text": choice.get("text") or message.get("content") or "",
            "thoughts": message.get("reasoning") or "",
            "calls": [
                [call["function"][part] for part in ("name", "arguments")] for call in message.get("tool_calls", [])
            ],
            "logprobs": positions(choice),
            "end": [choice["finish_reason"], choice.get("stop_reason")],
        }
    return told


def positions(choice: dict[str, Any]) -> int:
    """Tokens of which it has logprobs."""
    given = choice["logprobs"] or {}
    return len(given.get("content") or given.get("tokens") or [])


def fits(text: str, format: str) -> bool:
    """Whether a finished answer has the format."""
    match format:
        case "regex":
            return bool(re.fullmatch(REGEX, text))
        case "choice":
            return text in CHOICES
        case "grammar":
            return text in ("yes", "no")
        case "json_object":
            return isinstance(json.loads(text), dict)
        case "json_schema" | "json" | "closed":
            return jsonschema.Draft202012Validator(CITY).is_valid(json.loads(text))
    return True


def fields_of(row: Mapping[str, str]) -> str:
    """The row without what does nothing, for messages."""
    return str({name: value for name, value in row.items() if value != "absent"})


@pytest.mark.parametrize("route", ROUTES)
def test_pairs(server: RunningServer, route: str) -> None:
    """Guards every two features in one request: the bugs of a server live where two of them meet."""
    features = ROUTES[route]
    table = list(rows(features, HARD))

    def one(row: dict[str, str]) -> str | None:
        try:
            run(server, route, row)
        except Exception as error:
            return f"{fields_of(row)}: {type(error).__name__}: {str(error)[:600]}"
        return None

    with ThreadPoolExecutor(8) as threads:
        failures = [failure for failure in threads.map(one, table) if failure]
    assert not failures, f"{len(failures)} of {len(table)}:\n" + "\n".join(failures)


@pytest.mark.parametrize("route", ROUTES)
def test_pairs_that_cannot_be(server: RunningServer, route: str) -> None:
    """Guards clients: what cannot be done is a 400 with a sentence, never half of it; a stream says the same."""
    features = ROUTES[route]
    first = {name: next(iter(values)) for name, values in features.items()}
    for pair in sorted(HARD, key=sorted):
        if not all(value in features.get(name, ()) for name, value in pair):
            continue
        asked = body(features, first | {"max_tokens": "64"} | dict(pair))
        answer = server.post(route, **asked)
        if answer.status_code == 200:
            continue
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["message"].endswith("."), answer.text
        assert HARD[pair] in error["message"]
        stream = server.post(route, **asked, stream=True)
        said = stream.json() if stream.status_code != 200 else events(stream.content)[-1]
        assert said["error"] == error


def run(server: RunningServer, route: str, row: dict[str, str]) -> None:
    """One row, whole and streamed."""
    features = ROUTES[route]
    asked = body(features, row)
    options = asked.pop("stream_options", None)
    answer = server.post(route, **asked)
    assert answer.status_code == 200, answer.text
    chat = "chat" in route
    document = check(described(answer.json()), "CreateChatCompletionResponse" if chat else "CreateCompletionResponse")
    told = whole(document)
    choices = asked.get("n") or asked.get("num_return_sequences") or 1
    assert len(told) == choices * (2 if row["prompt"] == "two" else 1)
    assert document["usage"]["completion_tokens"] <= asked["max_tokens"] * len(told)
    for one in told.values():
        expect(row, one)
    stream = server.post(route, **asked, stream=True, **({"stream_options": options} if options else {}))
    assert stream.status_code == 200, stream.text
    said = streamed(stream)
    assert said == told, (said, told)
    if options:
        counts = [used["total_tokens"] for used in (events(stream.content)[-1]["usage"], document["usage"])]
        assert counts[0] == counts[1]


def expect(row: Mapping[str, str], said: dict[str, Any]) -> None:
    """What features promise of one choice."""
    reason, detail = said["end"]
    assert reason in ("stop", "length", "tool_calls"), reason
    assert (said["logprobs"] > 0) == (row["logprobs"] != "absent")
    ends_anywhere = row["ends"] != "min_tokens"  # a stop string in those tokens ends nothing
    if row["stop"] == "text" and ends_anywhere and row.get("echo") != "on" and not said["calls"]:
        assert "e" not in said["text"], said["text"]
    assert not (reason == "length" and row["format"] == "closed")
    if reason == "length" or detail is not None or row["ends"] == "forced":
        return  # cut in its middle
    tools = row.get("tools", "absent")
    if tools in ("required", "named"):
        assert said["calls"] and not said["text"]
    for name, arguments in said["calls"]:
        assert name == "get_weather"
        if tools in ("required", "named"):
            jsonschema.validate(json.loads(arguments), CITY)
    if not said["calls"] and row.get("echo") != "on":
        assert fits(said["text"].removesuffix("<|im_end|>"), row["format"]), said["text"]


def test_the_table_holds_every_pair() -> None:
    """Guards the generator: a pair it forgot would never be tested."""
    features = {name: list(values) for name, values in CHAT.items()}
    forbidden = {frozenset([("n", "2"), ("tools", "named")]), frozenset([("mode", "hot"), ("cut", "30")])}
    table = list(rows(features, forbidden))
    there = {pair for pair in every_pair(features) if any(pair <= set(row.items()) for row in table)}
    assert there == every_pair(features) - forbidden
    assert len(table) < 120
