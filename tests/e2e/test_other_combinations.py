"""Pairs of request features on the routes of other protocols, as far as they have them: no 5xx, equal streams."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from harness import RunningServer
from openai_app import check
from pairs import rows
from test_combinations import CITY, HARD, NOTHING, SAMPLING, Features, body, fields_of

COMMON: Features = {name: values for name, values in SAMPLING.items() if name not in ("n", "ids", "usage")} | {
    "mode": {"greedy": {"do_sample": False}, "seeded": {"do_sample": True, "seed": 7}},
}
QUESTION = "The weather in Paris?"
FUNCTION = {"type": "function", "name": "get_weather", "parameters": CITY}
TOOL = {"name": "get_weather", "input_schema": CITY}


def data(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data:") for line in answer.text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines]


def response_texts(answer: httpx.Response) -> list[str]:
    document = check(answer.json(), "Response")
    return [item.get("arguments") or item["content"][0]["text"] for item in document["output"]]


def response_events(answer: httpx.Response) -> list[str]:
    """What the deltas join to, item by item; the last event holds the same."""
    items: dict[int, str] = {}
    for event in data(answer):
        check(event, "ResponseStreamEvent")
        if event["type"].endswith(".delta"):
            items[event["output_index"]] = items.get(event["output_index"], "") + event["delta"]
    final = event["response"]["output"]
    assert [item.get("arguments") or item["content"][0]["text"] for item in final] == list(items.values())
    return list(items.values())


def message_texts(answer: httpx.Response) -> list[str]:
    blocks = answer.json()["content"]
    return [json.dumps(block["input"]) if "input" in block else block.get("text", "") for block in blocks]


def message_events(answer: httpx.Response) -> list[str]:
    texts: dict[int, str] = {}
    kinds: dict[int, str] = {}
    for event in data(answer):
        if event["type"] == "content_block_start":
            kinds[event["index"]] = event["content_block"]["type"]
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            texts[event["index"]] += event["delta"].get("text") or event["delta"].get("partial_json") or ""
    return [
        json.dumps(json.loads(text or "{}")) if kinds[index] == "tool_use" else text for index, text in texts.items()
    ]


def generated(answer: httpx.Response) -> list[str]:
    return [answer.json()["generated_text"]]


def generated_events(answer: httpx.Response) -> list[str]:
    return [data(answer)[-1]["generated_text"]]


@dataclass(frozen=True)
class Protocol:
    """A route, what it has beside COMMON, and what its answers say."""

    path: str
    stream: str
    features: Features
    texts: Callable[[httpx.Response], list[str]]
    streamed: Callable[[httpx.Response], list[str]]
    nested: bool = False

    def body(self, row: Mapping[str, str]) -> dict[str, Any]:
        asked = body(COMMON | self.features, row)
        return {"inputs": QUESTION, "parameters": asked} if self.nested else asked


PROTOCOLS = [
    Protocol(
        "/v1/responses",
        "/v1/responses",
        {
            "question": {
                "text": {"input": QUESTION},
                "items": {"instructions": "Be kind.", "input": [{"role": "user", "content": QUESTION}]},
            },
            "tools": NOTHING
            | {"auto": {"tools": [FUNCTION]}, "required": {"tools": [FUNCTION], "tool_choice": "required"}},
            "thoughts": NOTHING | {"low": {"reasoning": {"effort": "low"}}, "none": {"reasoning": {"effort": "none"}}},
        },
        response_texts,
        response_events,
    ),
    Protocol(
        "/v1/messages",
        "/v1/messages",
        {
            "question": {
                "text": {"messages": [{"role": "user", "content": QUESTION}], "model": ""},
                "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}], "model": ""},
            },
            "tools": NOTHING
            | {"auto": {"tools": [TOOL]}, "required": {"tools": [TOOL], "tool_choice": {"type": "any"}}},
            "thoughts": NOTHING | {"on": {"thinking": {"type": "enabled"}}, "off": {"thinking": {"type": "disabled"}}},
        },
        message_texts,
        message_events,
    ),
    Protocol(
        "/generate",
        "/generate_stream",
        {
            "details": NOTHING | {"on": {"details": True}, "top": {"details": True, "top_n_tokens": 2}},
            "full": NOTHING | {"on": {"return_full_text": True}},
            "search": NOTHING | {"guided": SAMPLING["search"]["guided"]},  # its streams tell logprobs, beams have none
        },
        generated,
        generated_events,
        nested=True,
    ),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.path)
def test_pairs(server: RunningServer, protocol: Protocol) -> None:
    """Guards every two features in one request, also where another protocol's names carry them."""
    features = {name: list(values) for name, values in (COMMON | protocol.features).items()}
    table = list(rows(features, HARD))

    def one(row: dict[str, str]) -> str | None:
        asked = protocol.body(row)
        try:
            answer = server.post(protocol.path, **asked)
            assert answer.status_code == 200, answer.text
            stream = server.post(protocol.stream, **asked | ({} if protocol.nested else {"stream": True}))
            assert stream.status_code == 200, stream.text
            told, said = protocol.texts(answer), protocol.streamed(stream)
            assert told == said
        except Exception as error:
            return f"{fields_of(row)}: {type(error).__name__}: {str(error)[:600]}"
        return None

    with ThreadPoolExecutor(8) as threads:
        failures = [failure for failure in threads.map(one, table) if failure]
    assert not failures, f"{len(failures)} of {len(table)}:\n" + "\n".join(failures)
