"""Anthropic's routes over a scripted engine."""

import json
from typing import Any

import pytest
from talk_app import TalkServer
from wire import Wire

PATH = "/v1/messages"
TOOLS = [{"name": "f", "description": "does", "input_schema": {"type": "object"}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "日本"}}\n</tool_call>'
TALK = f"<think>\nhm</think>\nSo: {CALL}"
BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": ""},
    {"type": "text", "text": "So:"},
    {"type": "tool_use", "name": "f", "input": {"a": "日本"}},
]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}], **fields}


async def whole(server: TalkServer, **fields: Any) -> Any:
    wire = await server.post(PATH, body(**fields))
    assert wire.status == 200, wire.body
    return json.loads(wire.body)


def events(wire: Wire) -> list[Any]:
    """Documents of a stream; each event is named after its type."""
    blocks = wire.body.decode().split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        found.append(document)
    return found


def built(found: list[Any]) -> dict[str, Any]:
    """The message that a stream's events build, as Anthropic's SDK would; checks their order."""
    message: dict[str, Any] = found[0]["message"]
    assert found[0]["type"] == "message_start" and message["content"] == []
    opened = None
    for event in found[1:-2]:
        if event["type"] == "content_block_start":
            assert opened is None and event["index"] == len(message["content"])
            opened = dict(event["content_block"])
            message["content"].append(opened)
        elif event["type"] == "content_block_stop":
            assert opened is not None
            if "json" in opened:
                opened["input"] = json.loads(opened.pop("json"))
            opened = None
        else:
            assert opened is not None and event["index"] == len(message["content"]) - 1
            delta = event["delta"]
            key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}[
                delta["type"]
            ]
            target = "json" if key == "partial_json" else key
            opened[target] = opened.get(target, "") + delta[key]
    assert opened is None and found[-1] == {"type": "message_stop"} and found[-2]["type"] == "message_delta"
    return message | found[-2]["delta"] | {"usage": found[-2]["usage"]}


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without ids, which differ."""
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": blocks}


@pytest.mark.parametrize("sizes", [(1,), (2, 5), (100,)])
async def test_stream_builds_the_whole(sizes: tuple[int, ...]) -> None:
    """Guards both forms: thoughts, text and a call, in blocks, whatever the cut into steps."""
    answer = await whole(TalkServer(TALK), tools=TOOLS)
    assert plain(answer)["content"] == BLOCKS and answer["stop_reason"] == "tool_use"
    assert answer["usage"]["cache_read_input_tokens"] == 2
    wire = await TalkServer(TALK, sizes).post(PATH, body(tools=TOOLS, stream=True))
    assert plain(built(events(wire))) == plain(answer)


@pytest.mark.parametrize(
    ("text", "finish", "fields", "reason", "sequence"),
    [
        ("Hi", "stop", {}, "end_turn", None),
        ("Hi", "length", {}, "max_tokens", None),
        ("Hi there", "length", {"stop_sequences": ["the"]}, "stop_sequence", "the"),
    ],
)
async def test_stop_reasons(text: str, finish: str, fields: Any, reason: str, sequence: str | None) -> None:
    """Guards agents, which go on or not by the reason."""
    answer = await whole(TalkServer(text, finish=finish), **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    wire = await TalkServer(text, finish=finish).post(PATH, body(stream=True, **fields))
    assert plain(built(events(wire))) == plain(answer)


async def test_conversation() -> None:
    """Guards the prompt: system, thoughts, calls and results become what the template knows, a prefill is continued."""
    server = TalkServer("!")
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "c"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]},
            {"type": "text", "text": "d"},
        ]},
        {"role": "assistant", "content": "I "},
    ]  # fmt: skip
    await whole(server, messages=talk, system=[{"type": "text", "text": "be"}])
    expected = (
        "system: be\nuser: ab\nassistant: c(t)<tool_call>f:[('x', 1)]</tool_call>\ntool: r\nuser: d\nassistant: I"
    )
    assert server.prompt.removeprefix("<s>").strip() == expected
    await whole(server, tools=TOOLS, thinking={"type": "disabled"})
    assert '"parameters": {"type": "object"}' in server.prompt and server.prompt.endswith("<think></think>")


async def test_a_message_without_parts() -> None:
    """Guards against a 500: it is an empty message."""
    server = TalkServer("!")
    await whole(server, messages=[{"role": "user", "content": []}])
    assert server.prompt.removeprefix("<s>") == "user: \n>"


async def test_fields_of_other_protocols() -> None:
    """Guards against silence: other names of stop sequences count too, and there is one answer whatever n says."""
    server = TalkServer("Hi there", finish="length")
    wire = await server.post(PATH, body(stop="the", n=2))
    assert json.loads(wire.body)["stop_sequence"] == "the" and wire.headers["x-ignored-params"] == "n"
    assert server.engine.submitted[-1].n == 1


async def test_count_tokens() -> None:
    """Guards clients that plan: the number is the prompt's that the engine would get."""
    server = TalkServer("!")
    await whole(server)
    wire = await server.post(f"{PATH}/count_tokens", {"messages": body()["messages"]})
    assert json.loads(wire.body) == {"input_tokens": len(server.engine.submitted[-1].prompt_ids)}
    assert len(server.engine.submitted) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"), ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"), ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search", "name": "w"}]}, "tools[0]"),
        ({"tools": [{"name": "f", "input_schema": {}, "strict": "no"}]}, "tools[0].strict"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"thinking": {"type": "x"}}, "thinking"),
        ({"model": "other"}, "model"), ({"max_tokens": 10**6}, "messages"),
    ],
    ids=str,
)  # fmt: skip
async def test_refusals(fields: dict[str, Any], param: str) -> None:
    """Guards clients: one sentence in Anthropic's shape, with the field at fault."""
    server = TalkServer("!")
    wire = await server.post(PATH, body(**fields))
    answer = json.loads(wire.body)
    assert wire.status in (400, 404) and answer["type"] == "error" and not server.engine.submitted
    assert answer["error"]["param"] == param and answer["error"]["message"].endswith(".")
    assert answer["error"]["type"] in ("invalid_request_error", "not_found_error")


async def test_ignored() -> None:
    """Guards against silence: what changes nothing is named."""
    wire = await TalkServer("!").post(PATH, body(thinking={"type": "enabled", "budget_tokens": 99}, service_tier="x"))
    assert wire.headers["x-ignored-params"] == "service_tier"
