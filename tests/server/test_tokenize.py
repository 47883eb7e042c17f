"""POST /tokenize and /detokenize."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from shell import check_error, client, make_services
from tiny_text import write_text_dir

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
