"""Clients that leave: over a real socket their rows are gone and their blocks free within a second."""

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from harness import Metrics, RunningServer, start_server

LIMIT_S = 1.0


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningServer]:
    """One row and 16 tokens a step: a second request queues, a long prompt takes many steps."""
    running = start_server("--max-num-seqs", "1", "--max-num-batched-tokens", "16")
    yield running
    assert running.stop() == 0


def open_request(server: RunningServer, path: str, **body: object) -> socket.socket:
    """Sends a request and returns its socket, nothing read yet."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + payload)
    return connection


def await_true(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> float:
    """Polls until the condition holds; returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s, "still not so"
        time.sleep(0.02)
    return time.monotonic() - begin


def idle(server: RunningServer, left: float) -> bool:
    """No row, no queue, no block, and `left` clients counted as gone: one look at the metrics."""
    names = ("ropeway_num_requests_running", "ropeway_num_requests_waiting", "ropeway_kv_cache_usage_perc")
    metrics = server.metrics()
    return all(metrics.total(name) == 0 for name in names) and departures(metrics) == left


def departures(metrics: Metrics) -> float:
    return metrics.total("ropeway_requests_total", outcome="disconnected")


ENDLESS = {"prompt": "1, 2, 3", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_tokens_come(server: RunningServer, stream: bool) -> None:
    """Guards blocks and rows: a client that leaves in mid-answer, streamed or not, costs nothing after a second."""
    before = server.metrics()
    connection = open_request(server, "/v1/completions", stream=stream, **ENDLESS)
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    else:
        await_true(lambda: server.metric("ropeway_num_requests_running") == 1, 10)
    connection.close()
    await_true(lambda: idle(server, departures(before) + 1))
    generated = server.metric("ropeway_generation_tokens_total") - before.total("ropeway_generation_tokens_total")
    assert 0 < generated < ENDLESS["max_tokens"]


def test_leaving_in_the_queue(narrow: RunningServer) -> None:
    """Guards the waiting queue: a queued client that leaves never gets a row."""
    before = departures(narrow.metrics())
    first = open_request(narrow, "/v1/completions", stream=True, **ENDLESS)
    assert first.recv(4096).startswith(b"HTTP/1.1 200")
    second = open_request(narrow, "/v1/completions", stream=True, **ENDLESS)
    await_true(lambda: narrow.metric("ropeway_num_requests_waiting") == 1, 10)
    second.close()
    await_true(lambda: narrow.metric("ropeway_num_requests_waiting") == 0)
    first.close()
    await_true(lambda: idle(narrow, before + 2))


def test_leaving_in_mid_prefill(narrow: RunningServer) -> None:
    """Guards prefill: a client that leaves while its prompt is computed never gets a token."""
    before = narrow.metrics()
    prompt = ", ".join(str(number) for number in range(300))
    connection = open_request(narrow, "/v1/completions", prompt=prompt, max_tokens=5)
    await_true(lambda: narrow.metric("ropeway_num_requests_running") == 1, 10)
    connection.close()
    await_true(lambda: idle(narrow, departures(before) + 1))
    name = "ropeway_generation_tokens_total"
    assert narrow.metric(name) == before.total(name)
