"""POST /v1/chat/completions, whole and streamed, against OpenAI's own description."""

import asyncio
import json
from typing import Any

import pytest
from openai_app import EOS, Server, check, check_stream, ids
from scripted import in_steps, row
from wire import Wire

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
TEXTS = ["Hello, 日本語!", "This is a test of the tokenizer."]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def rows(logprobs: int | None = None, sizes: tuple[int, ...] = (1, 3)) -> Any:
    tokens = [[*ids(text), EOS] for text in TEXTS]
    return in_steps(tokens, sizes, "stop", stop_id=EOS, logprobs=logprobs, cached=4)


async def whole(server: Server, **fields: Any) -> tuple[Any, Wire]:
    wire = await server.post(PATH, {"messages": [USER]} | fields)
    assert wire.status == 200, wire.body
    return check(json.loads(wire.body), "CreateChatCompletionResponse"), wire


async def streamed(server: Server, **fields: Any) -> tuple[list[Any], Wire]:
    wire = await server.post(PATH, {"messages": [USER], "stream": True} | fields)
    assert wire.status == 200, wire.body
    return check_stream(wire, "CreateChatCompletionStreamResponse"), wire


def joined(chunks: list[Any], index: int) -> dict[str, Any]:
    """A choice put together from its chunks, in the shape of a whole one."""
    mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    first, *deltas, last = mine
    assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in deltas)
    assert last["delta"] == {}
    logprobs = [position for choice in deltas if choice["logprobs"] for position in choice["logprobs"]["content"]]
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": "".join(choice["delta"]["content"] for choice in deltas),
            "refusal": None,
        },
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": last["finish_reason"],
        "stop_reason": last["stop_reason"],
    }


@pytest.mark.parametrize("sizes", [(1,), (2, 5), (100,)])
@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": True}, {"stop": ["ll", "語"]}, {"stop": "nowhere"}],
    ids=str,
)
async def test_stream_equals_whole(sizes: tuple[int, ...], fields: dict[str, Any]) -> None:
    """Guards clients that switch streaming on: same text, logprobs, reasons and usage, for every cut into steps."""
    logprobs = fields.get("top_logprobs", 0) if "logprobs" in fields else None
    answer, _ = await whole(Server(rows(logprobs)), n=2, **fields)
    options = {"include_usage": True}
    chunks, _ = await streamed(Server(rows(logprobs, sizes)), n=2, stream_options=options, **fields)
    assert [joined(chunks, index) for index in range(2)] == answer["choices"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    if not fields:
        assert [choice["message"]["content"] for choice in answer["choices"]] == TEXTS


async def test_whole_answer() -> None:
    """Guards the document, field by field."""
    answer, wire = await whole(Server(rows()), n=2)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["model"] == "tiny" and answer["created"] > 1_600_000_000
    tokens = sum(len(ids(text)) + 1 for text in TEXTS)
    prompt = len(ids("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["stop_reason"] is None
    assert wire.headers["content-type"] == "application/json" and wire.headers["x-request-id"]
    assert "x-ropeway-hint" not in wire.headers and "x-ignored-params" not in wire.headers


async def test_exact_bytes_of_a_stream() -> None:
    """Guards the wire: what a plain stream looks like, byte by byte."""
    wire = await Server([[row(0, ids("Hi"))], [row(0, [EOS], "stop", stop_id=EOS)]]).post(
        PATH, {"messages": [USER], "stream": True}
    )
    first = json.loads(wire.body.split(b"\n\n")[0].removeprefix(b"data: "))
    head = (
        f'data: {{"object":"chat.completion.chunk","id":"{first["id"]}","created":{first["created"]},"model":"tiny",'
        f'"system_fingerprint":"{first["system_fingerprint"]}","choices":[{{"index":0,"delta":'
    )
    assert wire.body.decode() == (
        head + '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '{"content":"Hi"},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


async def test_logprobs() -> None:
    """Guards logprobs: bytes spell the text, -inf is a number, as many top ones as asked for."""
    answer, _ = await whole(Server(rows(3)), logprobs=True, top_logprobs=3, n=2)
    for choice, text in zip(answer["choices"], TEXTS, strict=True):
        positions = choice["logprobs"]["content"]
        assert choice["logprobs"]["refusal"] is None
        assert bytes(byte for position in positions for byte in position["bytes"]).decode() == text + "<|im_end|>"
        assert all(len(position["top_logprobs"]) == 3 for position in positions)
        assert positions[0]["top_logprobs"][-1]["logprob"] == -9999.0
    answer, _ = await whole(Server(rows(0)), logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_running_usage() -> None:
    """Guards continuous_usage_stats: every chunk counts what was generated so far."""
    chunks, _ = await streamed(
        Server(rows()), n=2, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == sum(len(ids(text)) + 1 for text in TEXTS)


async def test_prompt_reaches_the_engine() -> None:
    """Guards the template: roles, text parts, and no BOS of the tokenizer on top of the template's."""
    server = Server(rows())
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    await whole(server, messages=messages, max_completion_tokens=7, max_tokens=9, seed=5, n=2, cache_salt="s")
    (sent,) = server.engine.submitted
    assert server.tokenizer.decode(sent.prompt_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (sent.max_tokens, sent.n, sent.sampling.seed, sent.options["cache_salt"]) == (7, 2, 5, "s")
    assert sent.sampling.stop_token_ids == (EOS,) and sent.sampling.logprobs is None
    await whole(server, max_tokens=None)
    assert server.engine.submitted[1].max_tokens == 500 - len(server.engine.submitted[1].prompt_ids)


async def test_long_conversations_leave_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the event loop: a long conversation is rendered in a thread."""
    calls = []
    to_thread = asyncio.to_thread

    async def spy(function: Any, *arguments: Any) -> Any:
        calls.append(function)
        return await to_thread(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", spy)
    server = Server(rows(), info={"max_model_len": 5000})
    await whole(server)
    assert not calls
    await whole(server, messages=[{"role": "user", "content": "a\n" * 20}, USER] * 10)
    assert len(calls) == 1


async def test_continuing_a_message() -> None:
    """Guards continue_final_message: the prompt ends inside of the last message."""
    server = Server(rows())
    messages = [USER, {"role": "assistant", "content": "Hello, wor"}]
    await whole(server, messages=messages, continue_final_message=True)
    text = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nHello, wor")
    error = await server.refused(
        PATH, {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    )
    assert error["param"] == "continue_final_message"


async def test_tools() -> None:
    """Guards against silence about tools: the model sees them, and the client is told how calls come back."""
    server = Server(rows())
    _, wire = await whole(server, tools=TOOLS)
    assert "text in content" in wire.headers["x-ropeway-hint"]
    _, wire = await whole(server, tools=TOOLS, tool_choice="none")
    assert "x-ropeway-hint" not in wire.headers
    _, wire = await whole(server, tools=[])
    assert "x-ropeway-hint" not in wire.headers
    prompts = [server.tokenizer.decode(sent.prompt_ids) for sent in server.engine.submitted]
    assert ['"name": "f"' in prompt for prompt in prompts] == [True, False, False]
    plain = Server(rows(), template="{{ messages[0].content }}")
    assert (await plain.refused(PATH, {"messages": [USER], "tools": TOOLS}))["param"] == "tools"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"temperature": -1}, "temperature"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tools": [{"function": {"name": 1}}]}, "tools[0]"),
        ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"max_tokens": 500}, "messages"),
    ],
)
async def test_refusals(fields: dict[str, Any], param: str) -> None:
    """Guards clients: each is a 400 that names the field, nothing reaches the engine, its place is free."""
    error = await Server(rows()).refused(PATH, {"messages": [USER]} | fields)
    assert error["param"] == param and error["type"] == "invalid_request_error" and isinstance(error["code"], str)


async def test_context_error() -> None:
    """Guards a conversation that is too long: the contract's sentence, never a cut prompt."""
    server = Server(rows())
    error = await server.refused(PATH, {"messages": [{"role": "user", "content": "a0" * 400}], "max_tokens": 5})
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 500 tokens. However, you requested ")
    small = Server(rows(), info={"num_blocks": 3, "block_size": 16})
    error = await small.refused(PATH, {"messages": [USER], "max_tokens": 32})
    assert "maximum context length is 32 tokens" in error["message"]


async def test_no_template() -> None:
    """Guards base models: chat without a template is refused in words."""
    error = await Server(rows(), template=None).refused(PATH, {"messages": [USER]})
    assert "no chat template" in error["message"] and "/v1/completions" in error["message"]


async def test_prompt_without_tokens() -> None:
    """Guards the engine, and with it everybody's requests: a prompt of no tokens ended it."""
    server = Server(rows(), template="{% for m in messages %}{{ m.content }}{% endfor %}")
    empty = {"messages": [{"role": "system", "content": ""}], "add_generation_prompt": False}
    error = await server.refused(PATH, empty)
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    counted = server.metrics.requests.labels
    assert counted("tiny", "rejected")._value.get() == 1, "a client's mistake is no error of the server"
    assert counted("tiny", "error")._value.get() == 0


async def test_template_error() -> None:
    """Guards the template's own complaint: it reaches the client."""
    server = Server(rows(), template="{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in (await server.refused(PATH, {"messages": [USER]}))["message"]


async def test_unknown_model() -> None:
    """Guards 404 for a model that is not here; an empty name names none."""
    server = Server(rows())
    error = await server.refused(PATH, {"messages": [USER], "model": "gpt-x"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    await whole(server, model="")
    await whole(server, model="tiny")


@pytest.mark.parametrize("sizes", [(1,), (2, 5)])
async def test_token_ids(sizes: tuple[int, ...]) -> None:
    """Guards clients that want ids: the prompt's once per choice, the output's in pieces that join to the whole."""
    answer, _ = await whole(Server(rows()), n=2, return_token_ids=True)
    server = Server(rows(sizes=sizes))
    chunks, _ = await streamed(server, n=2, return_token_ids=True)
    for index, choice in enumerate(answer["choices"]):
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == index]
        assert [id for piece in pieces for id in piece.get("token_ids", [])] == choice["token_ids"] != []
        assert [piece.get("prompt_token_ids") for piece in pieces[:2]] == [choice["prompt_token_ids"], None]
        assert choice["prompt_token_ids"] == server.engine.submitted[0].prompt_ids


async def test_ignored_fields() -> None:
    """Guards typos: named in a header, streamed or not; refused with --strict."""
    fields = {"temprature": 0.5, "user": "u", "metadata": {"a": "b"}, "service_tier": None}
    _, wire = await whole(Server(rows()), **fields)
    assert wire.headers["x-ignored-params"] == "temprature, user, metadata"
    _, wire = await streamed(Server(rows()), **fields)
    assert wire.headers["x-ignored-params"] == "temprature, user, metadata"
    error = await Server(rows(), strict=True).refused(PATH, {"messages": [USER]} | fields)
    assert error["param"] == "temprature"


async def test_full_queue_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards overload: a request is turned away before its prompt is tokenized."""
    server = Server(rows())
    ticket = server.admission.reserve(300)
    monkeypatch.setattr(server.tokenizer, "encode", None)
    wire = Wire(PATH, {"messages": [USER]})
    await wire.call(server.app)
    assert wire.status == 503 and wire.headers["retry-after"]
    assert json.loads(wire.body)["error"]["code"] == "server_overloaded"
    ticket.release()


async def test_deadlines() -> None:
    """Guards --request-timeout and the client's own header: the sooner one reaches the engine, as a point in time."""
    server = Server(rows(), request_timeout=5.0)
    sent = server.engine.submitted
    await whole(server)
    await server.post(PATH, {"messages": [USER]}, {"x-request-timeout-ms": "1500"})
    await server.post(PATH, {"messages": [USER]}, {"x-request-timeout-ms": "90000"})
    now = asyncio.get_running_loop().time()
    left = [request.options["deadline"] - now for request in sent]  # type: ignore[operator]
    assert 4 < left[0] <= 5 and 0.5 < left[1] <= 1.5 and 4 < left[2] <= 5
    await whole(Server(rows()))
    for bad in ("0", "-1", "1.5", "x", "9" * 30):
        error = await server.refused(PATH, {"messages": [USER]}, {"x-request-timeout-ms": bad})
        assert error["param"] == "x-request-timeout-ms"


async def test_client_leaves() -> None:
    """Guards queue and engine: after a client left both are free at once."""
    for stream in (True, False):
        server = Server([])
        server.engine.open_end = True
        wire = Wire(PATH, {"messages": [USER], "stream": stream})
        task = asyncio.create_task(wire.call(server.app))
        while not server.engine.submitted:
            await asyncio.sleep(0)
        assert server.admission.requests == 1
        wire.leave()
        await asyncio.wait_for(task, 1)
        assert server.engine.submitted[0].rows.aborted == [None]
        assert server.admission.requests == 0 and wire.messages == []
