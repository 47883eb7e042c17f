"""Tools and thoughts through the official openai SDK: text that the embedded model really generates."""

import json
from typing import Any

import openai
import pytest
from harness import RunningServer


def tool(name: str, description: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("get_weather", "The weather of a city."), tool("get_time", "The time in a city.")]
ONE, TWO = "What's the weather in Paris?", "What is the weather in Paris and Rome?"


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.openai()


def ask(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    options: dict[str, Any] = {"model": "", "temperature": 0, "max_tokens": 120} | fields
    given = [{"role": "user", "content": message} if isinstance(message, str) else message for message in messages]
    return client.chat.completions.create(messages=given, **options)


def calls(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def counted(usage: Any) -> tuple[int, int]:
    """Tokens of the answer, and of its thoughts."""
    return usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize(("question", "cities"), [(ONE, ["Paris"]), (TWO, ["Paris", "Rome"])])
def test_calls(client: openai.OpenAI, question: str, cities: list[str]) -> None:
    """Guards agents: the model's calls are calls, nothing of their markers is content."""
    (choice,) = ask(client, question, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert calls(choice.message) == [("get_weather", {"city": city}) for city in cities]
    assert len({call.id for call in choice.message.tool_calls}) == len(cities)
    if len(cities) > 1:
        (choice,) = ask(client, question, tools=TOOLS, parallel_tool_calls=False).choices
        assert choice.finish_reason == "tool_calls" and calls(choice.message) == [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize("question", [ONE, TWO, "Who are you?"])
def test_stream_equals_whole(client: openai.OpenAI, question: str) -> None:
    """Guards streams, as the SDK's own accumulator puts them together: the same calls, content, reason and usage."""
    whole = ask(client, question, tools=TOOLS)
    (choice,) = whole.choices
    options: Any = {"model": "", "temperature": 0, "max_tokens": 120, "stream_options": {"include_usage": True}}
    with client.chat.completions.stream(
        messages=[{"role": "user", "content": question}], tools=TOOLS, **options
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    (streamed,) = final.choices
    assert calls(streamed.message) == calls(choice.message)
    assert (streamed.message.content or None) == (choice.message.content or None)
    assert streamed.finish_reason == choice.finish_reason
    assert counted(final.usage) == counted(whole.usage)
    assert ("tool_calls.function.arguments.delta" in kinds) == (question in (ONE, TWO))


def test_deltas(client: openai.OpenAI) -> None:
    """Guards the wire shape: id, type and name once with empty arguments, then pieces of arguments as they come."""
    chunks = list(ask(client, TWO, tools=TOOLS, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    for index in (0, 1):
        first, *pieces = [delta for delta in deltas if delta.index == index]
        assert first.id and first.type == "function"
        assert (first.function.name, first.function.arguments) == ("get_weather", "")
        assert len(pieces) > 1, "arguments do not stream"
        assert all(piece.id is None and piece.type is None and piece.function.name is None for piece in pieces)
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_whole_turn(client: openai.OpenAI) -> None:
    """Guards the way back: the SDK's own message with its calls, and the tool's result, become a prompt."""
    asked = ask(client, ONE, tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "sunny"}
    (choice,) = ask(client, ONE, asked, result, tools=TOOLS).choices
    assert choice.finish_reason == "stop" and "sunny" in choice.message.content and "Paris" in choice.message.content


def test_no_calls_wanted(client: openai.OpenAI) -> None:
    """Guards tool_choice none: the model does not see the tools; and what it never heard of is refused in words."""
    (choice,) = ask(client, ONE, tools=TOOLS, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, ONE, tools=TOOLS, tool_choice="any")
    assert caught.value.param == "tool_choice"


def test_length(client: openai.OpenAI) -> None:
    """Guards agents against half a call: a limit in the middle of one is `length`, however far it came."""
    for limit in (3, 14):
        (choice,) = ask(client, ONE, tools=TOOLS, max_tokens=limit).choices
        assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, True),
        ({"reasoning_effort": "high", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, False),
    ],
)
def test_thoughts(client: openai.OpenAI, fields: Any, thinks: bool) -> None:
    """Guards reasoning: asked for and turned off, beside the content and not in it, counted, streamed alike."""
    whole = ask(client, "What's 17 + 26?", **fields)
    message = whole.choices[0].message
    assert message.content == "17 + 26 = 43."
    assert bool(getattr(message, "reasoning", "")) is thinks
    tokens, thoughts = counted(whole.usage)
    assert 0 < thoughts < tokens if thinks else thoughts == 0
    chunks = list(ask(client, "What's 17 + 26?", stream=True, stream_options={"include_usage": True}, **fields))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == getattr(message, "reasoning", "")
    assert counted(chunks[-1].usage) == (tokens, thoughts)
    if thinks:
        assert message.reasoning == message.reasoning_content and "7 + 6 = 13" in message.reasoning


def test_nothing_failed(server: RunningServer) -> None:
    """Guards the metric: a model that writes its calls well counts no failures."""
    before = server.metric("ropeway_tool_parse_failures_total")
    ask(server.openai(), TWO, tools=TOOLS)
    assert server.metric("ropeway_tool_parse_failures_total") == before


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thinking_budget(server: RunningServer, budget: int) -> None:
    """Guards the budget on every route: thoughts are cut, the answer follows, and usage counts what there was."""
    messages = [{"role": "user", "content": "What is 23 + 45?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, "thinking_budget": budget}
    answer = server.post("/v1/chat/completions", **body, reasoning_effort="high").json()
    message, usage = answer["choices"][0]["message"], answer["usage"]
    thoughts = usage["completion_tokens_details"]["reasoning_tokens"]
    assert message["content"] and "<think>" not in message["content"]
    assert thoughts == budget + 2  # the markers
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x", "y"]}}}
    answer = server.post("/v1/chat/completions", **body, reasoning_effort="high", response_format=schema).json()
    assert answer["choices"][0]["message"]["content"] in ('"x"', '"y"')
    thinking = {"type": "enabled", "budget_tokens": budget}
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, "model": "", "thinking": thinking}
    blocks = server.post("/v1/messages", **body).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"][budget < 5 :] and blocks[-1]["text"]


STRICT: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer", "minimum": 3, "maximum": 5}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def test_strict_tools(client: openai.OpenAI) -> None:
    """Guards `strict` under auto: a call that the model begins fits the schema; where it begins none, text is free."""
    function = {"name": "get_weather", "description": "The weather of a city.", "strict": True, "parameters": STRICT}
    fields: dict[str, Any] = {"tools": [{"type": "function", "function": function}], "max_tokens": 200}
    for seed in range(4):
        answer = ask(client, ONE, **fields, temperature=0.7 * (seed > 0), seed=seed).choices[0]
        assert seed or answer.message.tool_calls
        for call in answer.message.tool_calls or []:
            arguments = json.loads(call.function.arguments)
            assert arguments["city"] in ("Oslo", "Bergen") and 3 <= arguments["days"] <= 5 and len(arguments) == 2
    free = ask(client, "Who are you?", **fields).choices[0]
    assert free.message.content and free.finish_reason == "stop"


def test_one_call_ends_the_row(client: openai.OpenAI) -> None:
    """Guards cost: without parallel calls nothing is generated behind the first one."""
    both, one = (ask(client, TWO, tools=TOOLS, parallel_tool_calls=parallel) for parallel in (True, False))
    assert len(both.choices[0].message.tool_calls) > len(one.choices[0].message.tool_calls) == 1
    assert one.usage.completion_tokens < both.usage.completion_tokens and one.choices[0].finish_reason == "tool_calls"
