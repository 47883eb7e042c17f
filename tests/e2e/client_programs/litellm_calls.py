"""What a program that uses litellm does, for test_clients.py: argv holds the server's URL and its greedy answer."""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
import litellm

URL, EXPECTED = sys.argv[1:]
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}
CITY |= {"required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}


def ask(question: str, model: str = "openai/ropeway-demo", base: str = "/v1", **fields: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 120, "api_key": "none"} | fields
    return litellm.completion(model, [{"role": "user", "content": question}], api_base=URL + base, **options)


def together(stream: Any) -> Any:
    return litellm.stream_chunk_builder(list(stream)).choices[0].message


def calls(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


for model, base in (("openai/", "/v1"), ("hosted_vllm/", "/v1"), ("anthropic/", "")):
    assert ask("Who are you?", model + "ropeway-demo", base).choices[0].message.content == EXPECTED, model
    assert together(ask("Who are you?", model + "ropeway-demo", base, stream=True)).content == EXPECTED, model
weather = "What's the weather in Paris?"
assert calls(ask(weather, tools=TOOLS).choices[0].message) == [("get_weather", {"city": "Paris"})]
assert calls(together(ask(weather, tools=TOOLS, stream=True))) == [("get_weather", {"city": "Paris"})]
assert list(json.loads(ask("Paris", response_format=SCHEMA).choices[0].message.content)) == ["city"]
thinking = ask("What's 17 + 26?", extra_body={"reasoning_effort": "low"}).choices[0].message
assert "7 + 6 = 13" in thinking.reasoning_content and "43" in thinking.content
options: Any = {"api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
text = litellm.text_completion("1, 2", "text-completion-openai/ropeway-demo", max_tokens=6, **options)
assert text.choices[0].text == ", 3, 4"
answer: Any = litellm.responses("Who are you?", "openai/ropeway-demo", max_output_tokens=30, **options)
assert answer.output[0].content[0].text == EXPECTED
try:
    ask("Who are you?", max_tokens=0)
except litellm.BadRequestError as error:
    assert "max_tokens must be an integer of at least 1." in str(error)
else:
    raise AssertionError("a limit of 0 tokens is an error")
