"""Bodies that Python's own JSON parser would take, or fall over."""

import json

import pytest
from fastapi import APIRouter, FastAPI
from shell import check_error, client
from starlette.requests import Request

from ropeway.server.app import on_validation_error
from ropeway.server.json_route import JsonRoute


@pytest.fixture
def app() -> FastAPI:
    from typing import Annotated, Any

    from fastapi import Body
    from fastapi.exceptions import RequestValidationError

    router = APIRouter(route_class=JsonRoute)

    @router.post("/echo")
    async def echo(request: Request, body: Annotated[Any, Body()]) -> Any:
        assert await request.json() == body
        return body

    app = FastAPI(exception_handlers={RequestValidationError: on_validation_error})
    app.include_router(router)
    return app


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "tru',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"{'a': 1}",
        b"\xef\xbb\xbf{}x",
        b'{"a": 1} {"b": 2}',
        b"",
    ],
)
async def test_poison(app: FastAPI, body: bytes) -> None:
    """Guards the routes: each of these is a 400 in the one shape, none a 500 and none a value nobody can use."""
    async with client(app) as http:
        answer = await http.post("/echo", content=body, headers={"content-type": "application/json"})
    answer.headers["x-request-id"] = "made by a middleware that is not here"
    check_error(answer, 400, "invalid_json" if body else "invalid_value")
    assert len(answer.content) < 500


async def test_good_bodies_pass_unchanged(app: FastAPI) -> None:
    """Guards values: unicode, pairs of surrogates, big integers and floats come through as Python would read them."""
    for body in ('{"a": "\\ud83d\\ude00 é\\u0000"}', '{"seed": 18446744073709551616}', "[1.5, 1e308, -0.0]", "null"):
        async with client(app) as http:
            answer = await http.post("/echo", content=body.encode(), headers={"content-type": "application/json"})
        assert answer.json() == json.loads(body)
