"""Three answers about health, in every state of the engine."""

import asyncio
from pathlib import Path

import pytest
from fake_client import engine_status
from shell import client, make_services
from tiny_text import write_text_dir

from ropeway.server.app import create_app
from ropeway.server.health import LIVE, READY, STARTUP
from ropeway.server.keys import KeyRing
from ropeway.server.services import Services

OPEN = KeyRing([])


async def ask(services: Services, method: str = "GET") -> dict[str, int]:
    """Status by kind; aliases must agree."""
    answers = {}
    async with client(create_app(services, OPEN)) as http:
        for kind, paths in (("live", LIVE), ("ready", READY), ("startup", STARTUP)):
            (answers[kind],) = {(await http.request(method, path)).status_code for path in paths}
    return answers


async def test_while_loading() -> None:
    """Guards Kubernetes: a pod that loads is alive, not started and not ready, and says how far it is."""
    services = make_services(reason="loading")
    assert await ask(services) == {"live": 200, "ready": 503, "startup": 503}
    assert await ask(services, "HEAD") == {"live": 200, "ready": 503, "startup": 503}
    async with client(create_app(services, OPEN)) as http:
        answer = await http.get("/health/startup")
    body = answer.json()
    assert (body["stage"], body["progress"], body["error"]["code"]) == ("reading weights", 0.42, "loading")
    assert 1 <= int(answer.headers["retry-after"]) <= 120


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("engine_restarting", "engine_restarting"),
        ("engine_stalled", "engine_restarting"),
        ("engine_failed", "draining"),
        ("draining", "draining"),
    ],
)
def test_after_the_start(tmp_path: Path, reason: str, code: str) -> None:
    """Guards balancers: whatever stops tokens makes ready say why; live and startup stay 200, so nobody kills us."""
    services = make_services(write_text_dir(tmp_path))
    assert asyncio.run(ask(services)) == {"live": 200, "ready": 200, "startup": 200}
    services.client.status = engine_status(reason)  # type: ignore[misc]
    assert asyncio.run(ask(services)) == {"live": 200, "ready": 503, "startup": 200}

    async def why() -> str:
        async with client(create_app(services, OPEN)) as http:
            return str((await http.get("/health/ready")).json()["status"])

    assert asyncio.run(why()) == code


def test_ready_waits_for_the_tokenizer(tmp_path: Path) -> None:
    """Guards the moment between the engine's ready and ours: without a tokenizer no request can be served."""
    services = make_services(write_text_dir(tmp_path))
    services.created = 0
    assert asyncio.run(ask(services)) == {"live": 200, "ready": 503, "startup": 503}
