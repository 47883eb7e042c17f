"""Answers by schema, regular expression, choice and grammar through the openai SDK, with the embedded model."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from harness import RunningServer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
STREAMED = [False, True]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.openai()


def by_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def ask(client: openai.OpenAI, question: str, stream: bool = False, **fields: Any) -> Any:
    """One choice, put together by the SDK if streamed."""
    options: dict[str, Any] = {"model": "", "temperature": 0, "max_tokens": 300} | fields
    messages: list[Any] = [{"role": "user", "content": question}]
    if not stream:
        return client.chat.completions.create(messages=messages, **options).choices[0]
    with client.chat.completions.stream(messages=messages, **options) as events:
        for _ in events:
            pass
        return events.get_final_completion().choices[0]


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts are short enough to end."""
    kinds = ["integer", "boolean", "string", "enum", "null"] + ["object", "array", "anyOf"] * (depth > 0)
    kind = rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 200)}
    if kind == "string":
        return rng.choice([{"type": "string", "maxLength": 6}, {"type": "string", "pattern": "^[a-c]{2,4}$"}])
    if kind == "enum":
        return {"enum": rng.sample(["x", "yes", 3, None, "ünï"], 3)}
    if kind == "object":
        names = rng.sample(["a", "b", "long name", "é"], rng.randrange(1, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        some = names[: rng.randrange(len(names) + 1)]
        return {"type": "object", "properties": properties, "required": some, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randrange(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1), {"type": "null"}]}
    return {"type": kind}


def test_random_schemas_beside_free_rows(client: openai.OpenAI) -> None:
    """Guards validity: at a temperature at which the model says anything, many schemas in one batch; and the free rows
    among them say what they say alone."""
    free = ask(client, "Who are you?", max_tokens=40).message.content
    schemas = [random_schema(random.Random(seed)) for seed in range(24)]

    def one(seed: int) -> Any:
        if seed % 4 == 3:
            return ask(client, "Who are you?", max_tokens=40)
        schema = by_schema(schemas[seed])
        return ask(client, "Who are you?", response_format=schema, temperature=1.5, seed=seed, max_tokens=600)

    with ThreadPoolExecutor(8) as threads:
        choices = list(threads.map(one, range(24)))
    for seed, choice in enumerate(choices):
        if seed % 4 == 3:
            assert choice.message.content == free
            continue
        assert choice.finish_reason == "stop", f"schema {seed} does not end"
        jsonschema.validate(json.loads(choice.message.content), schemas[seed])


@pytest.mark.parametrize("stream", STREAMED)
def test_schema(client: openai.OpenAI, stream: bool) -> None:
    """Guards both shapes of an answer; the end of the JSON is the end of the answer, without an end token."""
    choice = ask(client, "Who are you?", stream, response_format=by_schema(SCHEMA))
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert choice.finish_reason == "stop" and not (choice.model_extra or {}).get("stop_reason")
    value = json.loads(
        ask(client, "Hi", stream, response_format={"type": "json_object"}, max_tokens=60).message.content
    )
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-[a-z]{2}"}}, r"[0-9]{3}-[a-z]{2}"),
        ({"guided_regex": "[A-Z][a-z]{1,5}"}, "[A-Z][a-z]{1,5}"),
        ({"structured_outputs": {"choice": ["red", "redder", "blue"]}}, "red|redder|blue"),
        ({"guided_grammar": 'start: A "!"\nA.2: "yes" | "no"'}, "(yes|no)!"),
        ({"ebnf": 'root ::= "a" [0-9]'}, "a[0-9]"),
        ({"guided_json": {"enum": ["p", "q"]}}, '"[pq]"'),
    ],
)
def test_other_formats(client: openai.OpenAI, fields: Any, pattern: str) -> None:
    """Guards vLLM's and SGLang's names: the answer is exactly a text of the format."""
    for seed in range(3):
        choice = ask(client, "Hi", extra_body=fields, temperature=1.5, seed=seed)
        assert re.fullmatch(pattern, choice.message.content), choice.message.content
        assert choice.finish_reason == "stop"


def test_completions_and_tgi(server: RunningServer) -> None:
    """Guards the routes without a template."""
    answer = server.post("/v1/completions", prompt=["Red", "Blue"], guided_choice=["one", "two"], n=2, temperature=1)
    assert {choice["text"] for choice in answer.json()["choices"]} <= {"one", "two"}
    answer = server.post("/generate", inputs="Red", parameters={"grammar": {"type": "regex", "value": "[a-z]{3}"}})
    assert re.fullmatch("[a-z]{3}", answer.json()["generated_text"])


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize("question", ["What's the weather in Rome?", "Who are you?"])
def test_forced_tools(client: openai.OpenAI, question: str, stream: bool) -> None:
    """Guards agents: a tool is called whatever was asked, by its schema; OpenAI's two finish reasons."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        answer = ask(client, question, stream, tools=TOOLS, tool_choice=choice)
        assert answer.finish_reason == reason and not answer.message.content
        for call in answer.message.tool_calls:
            assert call.function.name == "get_weather"
            jsonschema.validate(json.loads(call.function.arguments), CITY)


def test_after_thoughts(client: openai.OpenAI) -> None:
    """Guards reasoning: thoughts are free, the grammar is for what follows them."""
    body = {"chat_template_kwargs": {"enable_thinking": True}}
    choice = ask(client, "What is 23 + 45?", response_format=by_schema(SCHEMA), extra_body=body)
    assert choice.message.reasoning and "{" not in choice.message.reasoning
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)


@pytest.mark.parametrize("thinks", [False, True])
def test_complete_within_max_tokens(server: RunningServer, thinks: bool) -> None:
    """Guards `json_close_on_length`: from the number that the refusal names upwards, every answer is complete."""
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "response_format": by_schema(SCHEMA)}
    body |= {"json_close_on_length": True, "chat_template_kwargs": {"enable_thinking": thinks}}
    refused = server.post("/v1/chat/completions", **body, max_tokens=1)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    least = int(re.findall(r"at least (\d+)", refused.json()["error"]["message"])[0])
    assert server.post("/v1/chat/completions", **body, max_tokens=least - 1).status_code == 400

    def one(most: int) -> Any:
        sampling = {"temperature": 1.3, "seed": most} if most % 2 else {"temperature": 0}
        return server.post("/v1/chat/completions", **body, **sampling, max_tokens=most).json()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(least, least + 40)))
    for most, answer in enumerate(answers, start=least):
        (choice,) = answer["choices"]
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] <= most


def test_calls_within_max_tokens(server: RunningServer) -> None:
    """Guards forced calls and plain prompts the same way; what is no JSON is refused."""
    body = {"json_close_on_length": True, "temperature": 1.5, "seed": 1, "max_tokens": 24}
    named = {"type": "function", "function": {"name": "get_weather"}}
    messages = [{"role": "user", "content": "Hi"}]
    answer = server.post("/v1/chat/completions", **body, messages=messages, tools=TOOLS, tool_choice=named).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
    for most in range(8, 14):
        fields = body | {"max_tokens": most, "prompt": "Red", "response_format": {"type": "json_object"}}
        answer = server.post("/v1/completions", **fields).json()
        assert isinstance(json.loads(answer["choices"][0]["text"]), dict)
    for fields in ({}, {"guided_regex": "a"}):
        refused = server.post("/v1/completions", **body, prompt="Red", **fields)
        assert refused.json()["error"]["param"] == "json_close_on_length"


def test_other_protocols(server: RunningServer) -> None:
    """Guards the newer shapes: the same formats under their names."""
    shape = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
    answer = server.post("/v1/responses", input="Hi", text={"format": shape}, temperature=0).json()
    (text,) = [part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    jsonschema.validate(json.loads(text), SCHEMA)
    tool = {"name": "get_weather", "input_schema": CITY}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100, "tools": [tool], "model": ""}
    answer = server.post("/v1/messages", **body, temperature=0, tool_choice={"type": "any"}).json()
    assert (
        answer["stop_reason"] == "tool_use" and answer["content"][-1]["name"] == "get_weather"
    )  # thoughts may precede


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {"not": {}}}, "guided_json", "not"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "together"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "nothing"),
        ({"structured_outputs": {"what": 1}}, "structured_outputs", "what"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema", "name"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
    ],
)
def test_refused_before_the_stream(server: RunningServer, fields: Any, param: str, words: str) -> None:
    """Guards clients: what cannot be honoured is a 400 that says why, also of a stream."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    answer = server.post("/v1/chat/completions", **body, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param and words in answer.json()["error"]["message"]
