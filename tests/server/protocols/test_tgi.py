"""Text Generation Inference's routes over a scripted engine."""

import json
from typing import Any

import pytest
from openai_app import BOS, EOS, VOCAB, Server, ids
from scripted import in_steps, row
from wire import Wire

TEXTS = [" world, 日本!", " test of it"]


def rows(sizes: tuple[int, ...] = (1, 3), **options: Any) -> Any:
    return in_steps([ids(text) for text in TEXTS], sizes, "length", **({"logprobs": 0} | options))


async def ask(server: Server, path: str, stream: bool | None = None, **parameters: Any) -> Wire:
    body: dict[str, Any] = {"inputs": "Hello", "parameters": parameters}
    wire = await server.post(path, body if stream is None else body | {"stream": stream})
    assert wire.status == 200, wire.body
    return wire


def documents(wire: Wire) -> list[Any]:
    """Events as TGI's clients read them."""
    blocks = wire.body.decode().split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_generate() -> None:
    """Guards the plain answer, and TGI's defaults: greedy, 100 tokens, BOS as the tokenizer writes it."""
    server = Server(rows(logprobs=None))
    answer = json.loads((await ask(server, "/generate")).body)
    assert answer == {"generated_text": TEXTS[0]}
    sent = server.engine.submitted[0]
    assert sent.prompt_ids == [BOS, *ids("Hello")] and sent.max_tokens == 100
    assert sent.sampling.temperature == 0 and sent.sampling.logprobs is None
    assert json.loads((await ask(server, "/", max_new_tokens=3)).body) == [{"generated_text": TEXTS[0]}]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [({"do_sample": True}, 1), ({"temperature": 0.5}, 0.5), ({"top_p": 0.9}, 1), ({"top_p": 1.0, "seed": 5}, 0)],
    ids=str,
)
async def test_sampling_is_asked_for(parameters: dict[str, Any], temperature: float) -> None:
    """Guards Hugging Face's default: nothing is sampled unless a parameter says so."""
    server = Server(rows())
    await ask(server, "/generate", **parameters)
    assert server.engine.submitted[0].sampling.temperature == temperature


@pytest.mark.parametrize("sizes", [(1,), (2, 5), (100,)])
async def test_stream(sizes: tuple[int, ...]) -> None:
    """Guards the events: one per token, texts that join to the whole, the end only with the last one."""
    wire = await ask(Server(rows(sizes)), "/generate_stream", return_full_text=True)
    assert wire.headers["content-type"].startswith("text/event-stream")
    events = documents(wire)
    assert [event["token"]["id"] for event in events] == ids(TEXTS[0])
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    details = json.loads((await ask(Server(rows()), "/generate", details=True)).body)["details"]
    assert [event["token"] for event in events] == details["tokens"]
    assert "".join(event["token"]["text"] for event in events) == TEXTS[0]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "Hello" + TEXTS[0]
    expected = {"finish_reason": "length", "generated_tokens": len(events), "seed": None}
    assert events[-1]["details"] == expected | {"input_length": 1 + len(ids("Hello"))}
    assert documents(await ask(Server(rows(sizes)), "/", stream=True))[-1]["generated_text"] == TEXTS[0]


async def test_end_token_and_stop_sequence() -> None:
    """Guards reasons: the end token shows as a special one, a stop sequence is part of the text as in TGI."""
    script = [[row(0, ids("Hi"), logprobs=0)], [row(0, [EOS], "stop", stop_id=EOS, logprobs=0)]]
    events = documents(await ask(Server(script), "/generate_stream"))
    assert events[-1]["token"] == {"id": EOS, "text": "<|im_end|>", "logprob": -0.25, "special": True}
    assert events[-1]["generated_text"] == "Hi" and events[-1]["details"]["finish_reason"] == "eos_token"
    events = documents(await ask(Server(rows()), "/generate_stream", stop=["ld"]))
    assert events[-1]["generated_text"] == " world" == "".join(event["token"]["text"] for event in events)
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"


async def test_an_end_without_a_token() -> None:
    """Guards max_time: where it ends an answer between two tokens, an event says so, with the text held back."""
    server = Server([[row(0, ids("Hello"), logprobs=0)]])
    server.engine.open_end = True
    events = documents(await ask(server, "/generate_stream", max_time=0.02, stop=["Hello there"]))
    assert events[-1]["generated_text"] == "Hello" == "".join(event["token"]["text"] for event in events)
    assert events[-1]["details"]["generated_tokens"] == len(ids("Hello")) == events[-1]["index"]


async def test_details() -> None:
    """Guards `details`: tokens with their texts and logprobs, and top tokens if asked for."""
    answer = json.loads((await ask(Server(rows(logprobs=2)), "/generate", details=True, top_n_tokens=2)).body)
    details = answer["details"]
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]
    assert details["generated_tokens"] == len(details["tokens"]) == len(details["top_tokens"])
    assert all(len(top) == 2 for top in details["top_tokens"]) and details["prefill"] == []


async def test_best_of() -> None:
    """Guards best_of: the best of several is the answer, the others are in the details."""
    answer = json.loads((await ask(Server(rows()), "/generate", details=True, best_of=2, do_sample=True)).body)
    others = answer["details"]["best_of_sequences"]
    assert {answer["generated_text"], *(other["generated_text"] for other in others)} == set(TEXTS)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": 0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"truncate": 0}, "truncate_prompt_tokens"), ({"watermark": True}, "watermark"), ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"adapter_id": "x"}, "adapter_id"), ({"stop": [""]}, "stop"), ({"top_n_tokens": 10**6}, "top_n_tokens"),
        ({"max_new_tokens": 10**6}, "context"),
        ({"generation_config": {"num_beam_groups": 3}}, "generation_config.num_beam_groups"),
    ],
    ids=str,
)  # fmt: skip
async def test_refusals(parameters: dict[str, Any], name: str) -> None:
    """Guards clients: a sentence that names the parameter, in TGI's shape, and the engine sees nothing."""
    server = Server(rows())
    for path in ("/generate", "/generate_stream"):
        if path == "/generate_stream" and "best_of" in parameters:
            continue
        wire = await server.post(path, {"inputs": "Hello", "parameters": parameters})
        answer = json.loads(wire.body)
        assert wire.status == 400 and answer["error_type"] == "validation"
        assert name in answer["error"] and answer["error"].endswith(".") and "\n" not in answer["error"]
    assert not server.engine.submitted


@pytest.mark.parametrize("body", [{}, {"inputs": ""}, {"inputs": 5}, {"inputs": "a", "parameters": 5}, []], ids=str)
async def test_bad_bodies(body: Any) -> None:
    """Guards the engine against nothing at all."""
    assert (await Server(rows()).post("/generate", body)).status == 400


async def test_info() -> None:
    """Guards clients that size their requests by /info."""
    server = Server(rows())
    wire = Wire("/info")
    wire.scope["method"] = "GET"
    await wire.call(server.app)
    info = json.loads(wire.body)
    assert info["model_id"] == "tiny" and info["max_total_tokens"] == 500 and VOCAB > 0


async def test_load_model() -> None:
    """Guards `transformers chat`: it waits for this event, and leaves at a 404."""
    server = Server()
    wire = await server.post("/load_model", {"model": "tiny"})
    assert wire.headers["content-type"].startswith("text/event-stream")
    assert documents(wire) == [{"status": "ready", "model": "tiny", "cached": True}]
    assert (await server.refused("/load_model", {"model": "other"}))["code"] == "model_not_found"
    assert (await server.refused("/load_model", {"model": 5}))["param"] == "model"
