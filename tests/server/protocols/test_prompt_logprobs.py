"""Logprobs of prompts and token ids, in every shape that clients know: OpenAI's echo, vLLM's lists, TGI's prefill."""

import copy
import json
from typing import Any

import pytest
from openai_app import BOS, Server, check, check_stream, ids
from scripted import Wake, row, scored

PROMPT = [5, 6, 7, 8]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def script(top: int = 0, n: int = 1) -> list[Wake]:
    """The prompt's logprobs in two pieces, the second merged with the first token, then the end."""
    last = scored(PROMPT[3:], top)
    last.token_ids, last.logprobs = ids("Hi"), row(0, ids("Hi"), logprobs=top).logprobs
    first = [last, *(row(choice, ids("Hi"), logprobs=top) for choice in range(1, n))]
    end = [row(choice, ids(" you"), "length", logprobs=top) for choice in range(n)]
    return [[scored(PROMPT[1:3], top)], first, end]


def valid(document: Any) -> Any:
    """OpenAI's schema knows no null among logprobs, though its own answers have one for a prompt's first token."""
    known = copy.deepcopy(document)
    for choice in known["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            values = (choice.get("logprobs") or {}).get(name, [])
            values[:] = [value for value in values if value is not None]
    check(known, "CreateCompletionResponse")
    return document


async def ask(server: Server, path: str, **fields: Any) -> Any:
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hello"}]}
    wire = await server.post(path, prompt | {"max_tokens": 50} | fields)
    assert wire.status == 200, wire.body
    if fields.get("stream"):
        return [json.loads(e.removeprefix(b"data: ")) for e in wire.body.split(b"\n\n") if b"{" in e]
    return json.loads(wire.body)


@pytest.mark.parametrize("top", [0, 2])
async def test_echo_with_logprobs(top: int) -> None:
    """Guards loglikelihoods: the prompt's tokens come first, its first without a logprob; offsets count the prompt."""
    server = Server(script(top))
    answer = valid(await ask(server, COMPLETIONS, echo=True, logprobs=top))
    (choice,) = answer["choices"]
    sent, decode = server.engine.submitted[0], server.tokenizer.decode
    assert (sent.sampling.logprobs, sent.sampling.prompt_logprobs, sent.max_tokens) == (top, top, 50)
    assert choice["text"] == decode(PROMPT) + "Hi you"
    lists = choice["logprobs"]
    output = ids("Hi") + ids(" you")
    assert lists["tokens"] == [server.tokenizer.token_text(id) for id in PROMPT + output]
    assert lists["token_logprobs"] == [None, -3.0, -3.5, -4.0] + [-0.25] * len(output)
    assert lists["top_logprobs"][0] is None
    assert all(len(best) == 1 + top for best in lists["top_logprobs"][1:4])
    assert lists["text_offset"][0] == 0
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    chunks = await ask(Server(script(top)), COMPLETIONS, echo=True, logprobs=top, stream=True)
    pieces = [one for chunk in chunks for one in chunk["choices"] if one["logprobs"]]
    assert {name: [v for piece in pieces for v in piece["logprobs"][name]] for name in lists} == lists
    assert pieces[0]["logprobs"]["tokens"][: len(PROMPT)] == lists["tokens"][: len(PROMPT)]


async def test_nothing_but_scores() -> None:
    """Guards max_tokens 0: the engine's one token is neither text nor logprob nor usage, whatever it was."""
    for wakes in (script(1), [[scored(PROMPT[1:], 1)], [row(0, [1], "stop", stop_id=1, logprobs=1)]]):
        server = Server(wakes)
        answer = valid(await ask(server, COMPLETIONS, echo=True, logprobs=1, max_tokens=0))
        (choice,) = answer["choices"]
        assert choice["text"] == server.tokenizer.decode(PROMPT) and choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -3.5, -4.0]
        assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 4
        assert server.engine.submitted[0].max_tokens == 1
        chunks = await ask(Server(wakes), COMPLETIONS, echo=True, logprobs=1, max_tokens=0, stream=True)
        assert [one for chunk in chunks for one in chunk["choices"]] == [choice]


async def test_vllms_list() -> None:
    """Guards vLLM's clients: the prompt's own token first with its rank, no more than asked for; every choice."""
    server = Server(script(2, n=2))
    answer = valid(await ask(server, COMPLETIONS, prompt_logprobs=2, n=2, logprobs=0))
    for choice in answer["choices"]:
        first, second, *_ = choice["prompt_logprobs"]
        assert first is None and len(choice["prompt_logprobs"]) == len(PROMPT)
        text = server.tokenizer.token_text
        assert second == {
            "6": {"logprob": -3.0, "rank": 7, "decoded_token": text(6)},
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": text(7)},
            "8": {"logprob": -9999.0, "rank": 2, "decoded_token": text(8)},
        }
        assert len(choice["logprobs"]["tokens"]) == len(ids("Hi")) + len(ids(" you"))
    chunks = await ask(Server(script(2, n=2)), COMPLETIONS, prompt_logprobs=2, n=2, stream=True)
    told = [one for chunk in chunks for one in chunk["choices"] if "prompt_logprobs" in one]
    assert [one["index"] for one in told] == [0, 1]
    assert all(one["prompt_logprobs"] == answer["choices"][0]["prompt_logprobs"] for one in told)


async def test_chat() -> None:
    """Guards chat: the list stands beside the choices, in a stream with the role."""
    server = Server([[row(0, ids("Hi"), "length")]])
    await ask(server, CHAT)
    prompt = server.engine.submitted[0].prompt_ids
    wakes: list[Wake] = [[scored(prompt[1:], 1)], [row(0, ids("Hi"), "length")]]
    answer = check(await ask(Server(wakes), CHAT, prompt_logprobs=1), "CreateChatCompletionResponse")
    assert len(answer["prompt_logprobs"]) == len(prompt) and answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1][str(prompt[1])]["logprob"] == -0.5 * prompt[1]
    chunks = await ask(Server(wakes), CHAT, prompt_logprobs=1, stream=True)
    assert chunks[0]["choices"][0]["prompt_logprobs"] == answer["prompt_logprobs"]
    assert not any("prompt_logprobs" in chunk["choices"][0] for chunk in chunks[1:])


async def test_tgis_prefill() -> None:
    """Guards TGI's decoder_input_details: each token of the prompt with its logprob, the first without one."""
    body = {"inputs": "Hello", "parameters": {"details": True, "decoder_input_details": True}}
    prompt = [BOS, *ids("Hello")]
    wire = await Server([[scored(prompt[1:])], [row(0, ids("Hi"), "length", logprobs=0)]]).post("/generate", body)
    assert wire.status == 200, wire.body
    prefill = json.loads(wire.body)["details"]["prefill"]
    assert [token["id"] for token in prefill] == prompt
    assert [token["logprob"] for token in prefill] == [None, *(-0.5 * id for id in prompt[1:])]
    for path, options in (("/generate", {}), ("/generate_stream", {"details": True})):
        wire = await Server([]).post(path, {"inputs": "x", "parameters": {"decoder_input_details": True} | options})
        assert wire.status in (400, 422) and b"decoder_input_details needs" in wire.body


async def test_tokens_as_token_ids() -> None:
    """Guards clients that tell apart tokens of the same text: every name in the logprobs is an id."""
    answer = await ask(Server(script(2)), COMPLETIONS, echo=True, logprobs=2, return_tokens_as_token_ids=True)
    lists = answer["choices"][0]["logprobs"]
    assert lists["tokens"] == [f"token_id:{id}" for id in PROMPT + ids("Hi") + ids(" you")]
    assert all(name.startswith("token_id:") for best in lists["top_logprobs"][1:] for name in best)
    wakes: list[Wake] = [[row(0, ids("Hi"), "length", logprobs=1)]]
    answer = await ask(Server(wakes), CHAT, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    (position, *_) = answer["choices"][0]["logprobs"]["content"]
    assert position["token"] == f"token_id:{ids('Hi')[0]}" == position["top_logprobs"][0]["token"]
    assert bytes(position["bytes"]).decode() == "Hi"[: len(position["bytes"])]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": True}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": True, "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 0, "echo": True, "min_tokens": 3}, "min_tokens"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 1.5}, "prompt_logprobs"),
        (CHAT, {"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
        ("/v1/responses", {"input": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
    ],
    ids=str,
)
async def test_refusals(path: str, fields: dict[str, Any], param: str) -> None:
    """Guards clients: what cannot be done is a 400 that names the field."""
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hello"}]}
    error = await Server(script()).refused(path, (prompt if "input" not in fields else {}) | fields)
    assert error["param"] == param and error["message"]


async def test_streams_are_valid() -> None:
    """Guards the stream's schema with a prompt's logprobs in it, of chat."""
    wakes: list[Wake] = [[scored([5, 6])], [row(0, ids("Hi"), "length")]]
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "prompt_logprobs": 0}
    check_stream(await Server(wakes).post(CHAT, body), "CreateChatCompletionStreamResponse")
