"""POST /tokenize and /detokenize."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from shell import check_error, client, make_services
from tiny_text import write_text_dir

from ropeway.server import tokenize
from ropeway.server.app import create_app
from ropeway.server.keys import KeyRing
from ropeway.server.tokenize import DetokenizeBody, TokenizeBody

MESSAGES = [{"role": "user", "content": "one two"}]


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(make_services(write_text_dir(tmp_path)), KeyRing([]))


async def post(app: FastAPI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client(app) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_prompt(app: FastAPI) -> None:
    """Guards vLLM's body: special tokens are added unless the caller says no, strings only if asked for."""
    assert await post(app, "/tokenize", {"prompt": "one two"}) == {
        "count": 3,
        "max_model_len": 128,
        "tokens": [0, 3, 4],
        "token_strs": None,
    }
    answer = await post(app, "/tokenize", {"prompt": "one", "add_special_tokens": False, "return_token_strs": True})
    assert (answer["tokens"], answer["token_strs"]) == ([3], ["one"])
    assert (await post(app, "/tokenize", {"prompt": ""}))["tokens"] == [0]
    long = await post(app, "/tokenize", {"prompt": "one " * 2000, "model": "tiny"})
    assert long["count"] == 2001


async def test_messages(app: FastAPI) -> None:
    """Guards against a double BOS: messages go through the template, which writes special tokens itself."""
    answer = await post(app, "/tokenize", {"messages": MESSAGES})
    assert answer["tokens"] == [6, 7, 3, 4]
    assert (await post(app, "/tokenize", {"messages": MESSAGES, "add_special_tokens": True}))["tokens"][0] == 0


async def test_detokenize(app: FastAPI) -> None:
    """Guards the way back: special tokens stay, empty is empty."""
    ids = (await post(app, "/tokenize", {"prompt": "one two"}))["tokens"]
    assert await post(app, "/detokenize", {"tokens": ids}) == {"prompt": "<s>onetwo"}
    assert await post(app, "/detokenize", {"tokens": []}) == {"prompt": ""}


async def test_long_texts_are_few(app: FastAPI) -> None:
    """Guards prompts, which wait for the same threads: of many long texts most are told to come again; short ones
    and those after them pass."""
    long, short = {"prompt": "one " * 1000}, {"prompt": "one"}
    ids = {"tokens": [3] * 1000}
    async with client(app) as http:
        for path, body in (("/tokenize", long), ("/detokenize", ids)):
            answers = await asyncio.gather(*(http.post(path, json=body) for _ in range(3 * tokenize.MAX_LONG)))
            busy = [answer for answer in answers if answer.status_code != 200]
            assert 0 < len(busy) <= 2 * tokenize.MAX_LONG
            for answer in busy:
                check_error(answer, 503, "server_overloaded")
                assert answer.headers["retry-after"] == "1"
            answers = await asyncio.gather(*(http.post("/tokenize", json=short) for _ in range(30)))
            assert {answer.status_code for answer in answers} == {200}
            for _ in range(2 * tokenize.MAX_LONG):
                assert (await http.post(path, json=body)).status_code == 200


async def test_length_is_bounded(app: FastAPI) -> None:
    """Guards the threads: no text is longer than what is worked on in a second."""
    text = "x" * (tokenize.MAX_CHARS + 1)
    message = [{"role": "user", "content": text}]
    async with client(app) as http:
        for path, body, param in (
            ("/tokenize", {"prompt": text}, "prompt"),
            ("/tokenize", {"messages": message}, "messages"),
            ("/detokenize", {"tokens": [3] * (tokenize.MAX_IDS + 1)}, "tokens"),
        ):
            assert check_error(await http.post(path, json=body), 400, "invalid_value")["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [64]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
async def test_wrong_bodies(app: FastAPI, path: str, body: dict[str, Any], param: str) -> None:
    """Guards the tokenizer: ids against the logits' width, one input, right types."""
    async with client(app) as http:
        error = check_error(await http.post(path, json=body), 400, "invalid_value")
    assert error["param"] == param


def test_unknown_fields(tmp_path: Path) -> None:
    """Guards against silence: what nobody knows is named in a header, or refused with --strict."""
    text_dir = write_text_dir(tmp_path)

    async def ask(app: FastAPI) -> Any:
        async with client(app) as http:
            return await http.post("/tokenize", json={"prompt": "one", "lower": True})

    lenient, strict = (create_app(make_services(text_dir, strict=strict), KeyRing([])) for strict in (False, True))
    assert asyncio.run(ask(lenient)).headers["x-ignored-params"] == "lower"
    assert check_error(asyncio.run(ask(strict)), 400, "unknown_parameter")["param"] == "lower"


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [(TokenizeBody, "messages", 10**5), (TokenizeBody, "tools", 10**5), (DetokenizeBody, "tokens", 10**5)],
)
def test_long_wrong_lists_are_one_error(kind: type[BaseModel], name: str, count: int) -> None:
    """Guards the event loop: an error per element took seconds and hundreds of megabytes."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: ["x"] * count})
    assert caught.value.error_count() == 1
