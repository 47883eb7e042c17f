"""The door: every route but health wants a key, and the key's id goes with the request."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from shell import check_error, client, make_services
from tiny_text import write_text_dir

from ropeway.server.app import create_app
from ropeway.server.auth import Auth
from ropeway.server.health import HEALTH_PATHS
from ropeway.server.keys import KeyRing, key_hash

KEYS = KeyRing([key_hash("good")])
GOOD = {"Authorization": "Bearer good"}


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    return write_text_dir(tmp_path)


def paths(app: Any) -> list[tuple[str, str]]:
    """(method, path) of everything the OpenAPI description and the router know."""
    documented = [(method.upper(), path) for path, item in app.openapi()["paths"].items() for method in item]
    return [*documented, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/")]


def test_every_route_but_health_wants_a_key(text_dir: Path) -> None:
    """Guards the door: walks all routes, so that a new one cannot be forgotten."""
    app = create_app(make_services(text_dir), KEYS)

    async def walk() -> None:
        async with client(app) as http:
            walked = paths(app)
            assert {"/v1/chat/completions", "/v1/models", "/metrics", "/tokenize"} <= {path for _, path in walked}
            for method, path in walked:
                answer = await http.request(method, path)
                if path in HEALTH_PATHS:
                    assert answer.status_code == 200, path
                    continue
                assert answer.status_code == 401 and "API key is missing" in answer.text  # in many shapes
                assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]
                assert (await http.request(method, path, headers=GOOD)).status_code != 401
            for path in HEALTH_PATHS:
                assert (await http.get(path)).status_code == 200
            error = check_error(await http.get("/v1/models"), 401, "invalid_api_key")
            assert error["type"] == "authentication_error"

    asyncio.run(walk())


@pytest.mark.parametrize(
    "path",
    ["/health/live/", "/health/../v1/models", "//health/live", "/HEALTH", "/health/live/x", "/v1/models?/health"],
)
async def test_paths_that_look_like_health(text_dir: Path, path: str) -> None:
    """Guards against a door beside the door: only the exact health paths are open."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("let in")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await Auth(app, KEYS)({"type": "http", "path": path, "headers": [], "state": {}}, receive, send)
    assert sent[0]["status"] == 401


async def test_key_id_goes_with_the_request() -> None:
    """Guards fair share and the cache's salt: the route sees a short hash, never the key."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"])

    async def nothing(*_: Any) -> Any: ...

    headers = [(b"authorization", b"Bearer good")]
    await Auth(app, KEYS)({"type": "http", "path": "/v1/models", "headers": headers, "state": {}}, nothing, nothing)
    assert seen == [{"key_id": key_hash("good").hex()[:12]}]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    twice = {"type": "http", "path": "/v1/models", "headers": headers * 2, "state": {}}
    await Auth(app, KEYS)(twice, nothing, send)
    assert sent[0]["status"] == 401 and len(seen) == 1


async def test_root_path() -> None:
    """Guards proxies that keep their prefix: health under it is open, the rest is not."""
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def nothing(*_: Any) -> Any: ...

    for path in ("/llm/health/live", "/health/live", "/llm/v1/models", "/llm/llm/health/live"):
        await Auth(app, KEYS, "/llm")({"type": "http", "path": path, "headers": [], "state": {}}, nothing, nothing)
    assert reached == ["/llm/health/live", "/health/live"]
