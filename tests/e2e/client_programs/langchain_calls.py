"""What a program that uses langchain-openai does, for test_clients.py: argv holds the URL and the greedy answer."""

import sys
from functools import reduce
from operator import add
from typing import Any, Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, SecretStr

URL, EXPECTED = sys.argv[1:]
OPTIONS: dict[str, Any] = {
    "model": "ropeway-demo",
    "base_url": f"{URL}/v1",
    "api_key": SecretStr("none"),
    "temperature": 0,
    "max_tokens": 60,
}
WEATHER = "What's the weather in Paris?"


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome"]
    big: bool


chat = ChatOpenAI(**OPTIONS)
whole = chat.invoke("Who are you?")
assert whole.content == EXPECTED and whole.usage_metadata
pieces: Any = list(chat.stream("Who are you?", stream_usage=True))
assert reduce(add, pieces).content == EXPECTED and len(pieces) > 3
assert reduce(add, pieces).usage_metadata == whole.usage_metadata
assert [answer.content for answer in chat.batch(["Who are you?"] * 3)] == [EXPECTED] * 3
tools = chat.bind_tools([get_weather])
for message in (tools.invoke(WEATHER), reduce(add, list(tools.stream(WEATHER)))):  # type: ignore[arg-type]
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("get_weather", {"city": "Paris"})]
forced: Any = chat.bind_tools([get_weather], tool_choice="get_weather").invoke("Who are you?")
assert [call["name"] for call in forced.tool_calls] == ["get_weather"]
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Place, method=method).invoke("Paris"), Place), method  # type: ignore[arg-type]
assert len(chat.bind(logprobs=True).invoke("Who are you?").response_metadata["logprobs"]["content"]) > 3
newer = ChatOpenAI(**OPTIONS, use_responses_api=True).invoke("Who are you?")
assert newer.text == EXPECTED
texts = OpenAI(**OPTIONS | {"max_tokens": 6}).batch(["1, 2", "A, B"])
assert texts == [", 3, 4", ", C, D, E"], texts
