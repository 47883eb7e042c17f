"""Names of the model, and what is said of it."""

import asyncio
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from shell import check_error, client, make_services
from tiny_text import write_text_dir

from ropeway import __version__
from ropeway.server.app import create_app
from ropeway.server.keys import KeyRing


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(make_services(write_text_dir(tmp_path)), KeyRing([]))


async def test_list(app: FastAPI) -> None:
    """Guards discovery: every served name, with its context and the time it was loaded."""
    async with client(app) as http:
        listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny", "org/tiny"]
    for model in listed["data"]:
        assert model["object"] == "model" and model["max_model_len"] == 128
        assert abs(model["created"] - time.time()) < 60


@pytest.mark.parametrize("path", ["tiny", "org/tiny", "org%2Ftiny"])
async def test_one(app: FastAPI, path: str) -> None:
    """Guards ids with a slash, which SDKs escape."""
    async with client(app) as http:
        answer = await http.get(f"/v1/models/{path}")
    assert answer.status_code == 200 and answer.json()["id"] == path.replace("%2F", "/")


@pytest.mark.parametrize("path", ["huge", "../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "x" * 5000, "%00", "%FF"])
async def test_unknown(app: FastAPI, path: str) -> None:
    """Guards against files behind names and endless messages: unknown is 404, and says what there is."""
    async with client(app) as http:
        answer = await http.get(f"/v1/models/{path}")
        body = await http.post("/tokenize", json={"model": path, "prompt": "one"})
    if "passwd" not in path or "%" in path:  # httpx resolves plain ".." itself
        error = check_error(answer, 404, "model_not_found")
        assert "tiny" in error["message"] and len(error["message"]) < 300
    assert check_error(body, 404, "model_not_found")["param"] == "model"


async def test_version(app: FastAPI) -> None:
    """Guards those who watch rollouts."""
    async with client(app) as http:
        assert (await http.get("/version")).json() == {"version": __version__}


def test_while_loading() -> None:
    """Guards early callers: 503 with Retry-After, not a model with made-up facts."""

    async def ask() -> None:
        async with client(create_app(make_services(reason="loading"), KeyRing([]))) as http:
            for path in ("/v1/models", "/v1/models/tiny"):
                answer = await http.get(path)
                check_error(answer, 503, "loading")
                assert answer.headers["retry-after"]
            assert (await http.get("/version")).status_code == 200

    asyncio.run(ask())
