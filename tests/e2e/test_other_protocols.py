"""The official SDKs for /v1/responses and /v1/messages against the running server."""

import json
from collections.abc import Iterator

import anthropic
import pytest
from harness import Reference, RunningServer, start_server
from openai_app import check

QUESTION = "Who are you?"
GREEDY = {"temperature": 0}
"""The SDK has no parameter for it any more."""
TALK = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_messages(claude: anthropic.Anthropic, reference: Reference) -> None:
    """Guards anthropic's SDK: whole, streamed through its own accumulator, counted; greedy as generate()."""
    options = {"model": "ropeway-demo", "max_tokens": 30, "messages": TALK, "extra_body": GREEDY}
    expected = reference.chat(TALK, 30)
    answer = claude.messages.create(**options)  # type: ignore[call-overload]
    assert answer.content[0].text == expected and answer.stop_reason == "end_turn"
    with claude.messages.stream(**options) as stream:  # type: ignore[arg-type]
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.content[0].text == expected and final.usage.output_tokens == answer.usage.output_tokens
    prompt = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert claude.messages.count_tokens(model="ropeway-demo", messages=TALK).input_tokens == prompt  # type: ignore[arg-type]
    cut = claude.messages.create(**options | {"max_tokens": 2})  # type: ignore[call-overload]
    assert cut.stop_reason == "max_tokens"


def test_messages_errors(claude: anthropic.Anthropic) -> None:
    """Guards errors: the SDK's class, and a body that it can read."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="ropeway-demo", max_tokens=20_000, messages=TALK)  # type: ignore[arg-type]
    assert caught.value.body["error"]["code"] == "context_length_exceeded"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=5, messages=TALK)  # type: ignore[arg-type]


def test_responses(server: RunningServer, reference: Reference) -> None:
    """Guards openai's SDK on its newer route: whole, streamed through its accumulator, greedy as generate()."""
    client = server.openai()
    expected = reference.chat(TALK, 30)
    options = {"model": "ropeway-demo", "input": QUESTION, "temperature": 0, "max_output_tokens": 30}
    answer = client.responses.create(**options)  # type: ignore[call-overload]
    assert answer.output_text == expected and answer.status == "completed"
    check(server.post("/v1/responses", **options).json(), "Response")
    for line in server.post("/v1/responses", **options, stream=True).text.splitlines():
        if line.startswith("data: "):
            check(json.loads(line.removeprefix("data: ")), "ResponseStreamEvent")
    events = list(client.responses.create(**options, stream=True))  # type: ignore[call-overload]
    assert events[-1].response.output_text == expected
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    with client.responses.stream(**options) as stream:  # type: ignore[arg-type]
        assert stream.get_final_response().output_text == expected
    assert client.responses.create(**options | {"input": TALK}).output_text == expected  # type: ignore[call-overload]
    cut = client.responses.create(**options | {"max_output_tokens": 2})  # type: ignore[call-overload]
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_tools_of_the_embedded_model(server: RunningServer, claude: anthropic.Anthropic) -> None:
    """Guards tools on both routes: what the model calls arrives as the SDK's own type."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = claude.messages.create(
        model="ropeway-demo",
        max_tokens=60,
        extra_body=GREEDY,
        messages=question,  # type: ignore[arg-type]
        tools=[{"name": "get_weather", "description": "Weather of a city", "input_schema": schema}],
    )
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and call.name == "get_weather" and call.input == {"city": "Paris"}
    response = server.openai().responses.create(
        model="ropeway-demo",
        max_output_tokens=60,
        temperature=0,
        input="What is the weather in Paris?",
        tools=[{"type": "function", "name": "get_weather", "description": "Weather of a city", "parameters": schema}],  # type: ignore[list-item]
    )
    assert [item.arguments for item in response.output if item.type == "function_call"] == ['{"city": "Paris"}']


def test_anthropics_key_header() -> None:
    """Guards the door: Anthropic's clients send the key as x-api-key."""
    guarded = start_server("--api-key", "correct-horse")
    try:
        for key, fits in (("correct-horse", True), ("wrong", False)):
            with anthropic.Anthropic(base_url=guarded.url, api_key=key, max_retries=0) as client:
                if fits:
                    assert client.messages.create(model="", max_tokens=2, messages=TALK).content  # type: ignore[arg-type]
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        client.messages.create(model="", max_tokens=2, messages=TALK)  # type: ignore[arg-type]
    finally:
        assert guarded.stop() == 0
