"""Two servers behind a real nginx with deploy/nginx.conf, and promtool over what they measure.

Only addresses and paths of the configuration are replaced. `make test-tools` installs both programs.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest
from harness import RunningServer, free_port, start_server

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
LONG = {"max_tokens": 500, "ignore_eos": True, "temperature": 0.8, "seed": 7}
TOGETHER_S = 0.0003
"""Less than any step takes: such chunks were held back somewhere."""
pytestmark = pytest.mark.slow


def tool(name: str) -> str:
    """Where a program lies. Debian keeps nginx out of users' paths."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert path, f"{name} is missing: make test-tools"
    return path


@contextlib.contextmanager
def two_replicas() -> Iterator[list[RunningServer]]:
    """Two servers, started side by side."""
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda _: start_server(), range(2)))
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


@contextlib.contextmanager
def balancing(replicas: list[RunningServer], folder: Path) -> Iterator[str]:
    """nginx in front of the replicas: its URL."""
    port = free_port()
    text = (DEPLOY / "nginx.conf").read_text().replace("/tmp/", f"{folder}/").replace("8080", f"127.0.0.1:{port}")
    for number, server in enumerate(replicas, 1):
        text, found = re.subn(rf"ropeway-{number}:8000", f"127.0.0.1:{server.port}", text)
        assert found == 1
    config = folder / "nginx.conf"
    config.write_text(text.replace("/dev/stdout", f"{folder}/access.log"))
    process = subprocess.Popen([tool("nginx"), "-p", str(folder), "-c", str(config), "-g", "daemon off;"])
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/balancer/live"):
            assert process.poll() is None
            time.sleep(0.02)
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[RunningServer]]:
    """For tests that leave them as they are."""
    with two_replicas() as servers:
        yield servers


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 204
    except httpx.TransportError:
        return False


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


async def stream(api: openai.AsyncOpenAI, arrivals: list[float]) -> str:
    """Reads one long answer, noting when each chunk came: its finish reason, or "broken"."""
    reason = "broken"
    try:
        async for chunk in await api.completions.create(model="", prompt="1, 2, 3", extra_body=LONG, stream=True):
            arrivals.append(time.monotonic())
            reason = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), reason)
    except (openai.APIError, httpx.TransportError):
        pass
    return reason


async def test_tokens_pass_as_they_come(replicas: list[RunningServer], tmp_path: Path) -> None:
    """Guards streams against a proxy that gathers them: through nginx chunks come one by one, not in a few bursts."""
    arrivals: list[float] = []
    with balancing(replicas, tmp_path) as url:
        async with client(url) as api:
            assert await stream(api, arrivals) == "length"
        assert httpx.get(f"{url}/metrics").status_code == 404, "one replica's figures, for everybody"
        assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
    gaps = sorted(after - before for before, after in pairwise(arrivals))
    together = sum(gap < TOGETHER_S for gap in gaps) / len(gaps)
    print(f"{len(gaps)} gaps, median {gaps[len(gaps) // 2] * 1e3:.1f} ms, longest {gaps[-1] * 1e3:.1f} ms")
    assert len(gaps) > 100 and together < 0.5


async def test_replicas_are_killed(tmp_path: Path) -> None:
    """Guards everybody but the streams that had begun on the dead replica: others go on, new requests are answered.

    With the second one gone too, nginx itself says so in the API's error shape.
    """
    with two_replicas() as (first, second), balancing([first, second], tmp_path) as url:
        async with client(url) as api:
            began: list[list[float]] = [[] for _ in range(12)]
            streams = [asyncio.create_task(stream(api, arrivals)) for arrivals in began]
            while not all(began):
                await asyncio.sleep(0.01)
            lost = int(first.metric("ropeway_num_requests_running"))
            os.kill(first.process.pid, signal.SIGKILL)
            new = [api.completions.create(model="", prompt="1, 2", max_tokens=8) for _ in range(12)]
            answers = await asyncio.gather(*new)
            reasons = await asyncio.gather(*streams)
        second.process.kill()
        second.process.wait(30)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "1"}, timeout=30)
    print(f"{lost} of 12 streams ran on the killed replica; {reasons.count('broken')} broke, 12 new ones were answered")
    assert all(answer.choices[0].text for answer in answers)
    assert 0 < lost < 12 and sorted(reasons) == ["broken"] * lost + ["length"] * (12 - lost)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert refused.json()["error"]["code"] == "unreachable"


def test_promtool_accepts_the_metrics(replicas: list[RunningServer]) -> None:
    """Guards scrapers and boards: names and help follow Prometheus' own rules, and docs/metrics.md has them all."""
    assert replicas[0].post("/v1/completions", prompt="1, 2", max_tokens=4).status_code == 200
    text = replicas[0].get("/metrics").text
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    scraped = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len(scraped) > 20
    assert [name for name, kind in scraped if f"| `{name}` | {kind} |" not in table] == []
    assert replicas[0].metric("ropeway_ready") == 1


def test_promtool_accepts_the_alerts() -> None:
    """Guards the people who are woken: every alert fires on its fault and on nothing that looks alike."""
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([tool("promtool"), *command], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
