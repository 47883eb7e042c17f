"""What a request leaves in the metrics, and GET /metrics over several processes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from shell import client, make_services
from tiny_text import write_text_dir

from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.server import metrics as module
from ropeway.server.admission import Admission
from ropeway.server.app import create_app
from ropeway.server.keys import KeyRing
from ropeway.server.metrics import RequestMetrics, RequestRecord, watch_loop
from ropeway.server.request import ChoiceDelta


class Bench:
    """Metrics, an admission, and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.metrics = RequestMetrics("tiny", CollectorRegistry())
        self.admission = Admission(8, 100, self.metrics.rejected, lambda: self.now)

    def begin(self, n: int = 1, key_id: str = "") -> RequestRecord:
        """A request that arrived just now."""
        scope = {"state": {"key_id": key_id, "arrival": self.now}}
        record = self.metrics.begin(scope, n, self.admission.reserve(n))
        assert scope["state"]["record"] is record
        return record

    def get(self, name: str, **labels: str) -> float:
        """One sample, 0 if there is none."""
        value = self.metrics.registry.get_sample_value(f"ropeway_{name}", {"model_name": "tiny"} | labels)
        return value or 0.0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_times_of_a_request(bench: Bench) -> None:
    """Guards the latencies: TTFT from arrival, ITL per wake-up, the mean per output token without the first one."""
    record = bench.begin()
    record.settle(10)
    assert bench.admission.tokens == 10
    bench.now += 2
    record.observe(ChoiceDelta(0, token_ids=[1]))
    assert bench.admission.tokens == 0 and bench.admission.requests == 1
    bench.now += 1
    record.observe(ChoiceDelta(0))  # text only: no token came
    bench.now += 3
    record.observe(ChoiceDelta(0, token_ids=[2, 3], finish_reason="length"))
    bench.now += 1
    record.finish()
    sums = {name: bench.get(f"{name}_sum") for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")}
    assert sums == {"time_to_first_token_seconds": 2, "inter_token_latency_seconds": 4}
    assert bench.get("inter_token_latency_seconds_count") == 1
    assert bench.get("request_time_per_output_token_seconds_sum") == 2
    assert bench.get("e2e_request_latency_seconds_sum") == 7
    assert (bench.get("request_prompt_tokens_sum"), bench.get("request_generation_tokens_sum")) == (10, 3)
    assert bench.get("requests_total", outcome="length") == 1
    assert bench.admission.requests == 0


def test_choices_are_timed_apart(bench: Bench) -> None:
    """Guards n: the gap between two choices' tokens is no inter-token latency."""
    record = bench.begin(n=2)
    for index in (0, 1):
        bench.now += 5
        record.observe(ChoiceDelta(index, token_ids=[1]))
    bench.now += 1
    for index in (0, 1):
        record.observe(ChoiceDelta(index, token_ids=[2], finish_reason="stop"))
    record.finish()
    assert bench.get("time_to_first_token_seconds_count") == 1
    assert bench.get("inter_token_latency_seconds_sum") == 6 + 1
    assert bench.get("request_params_n_sum") == 2
    assert bench.get("requests_total", outcome="stop") == 1


def test_the_first_outcome_stays(bench: Bench) -> None:
    """Guards the counts: stream and handler both finish a request, it is counted once."""
    record = bench.begin()
    record.finish("disconnected")
    record.finish("error")
    record.finish()
    assert bench.get("requests_total", outcome="disconnected") == 1
    assert bench.get("requests_total", outcome="error") == bench.get("requests_total", outcome="stop") == 0
    assert bench.get("e2e_request_latency_seconds_count") == 1


def test_tokens_per_key(bench: Bench) -> None:
    """Guards billing by key: prompt and output tokens under the key's short id, none for an open server."""
    for key_id in ("abc", ""):
        record = bench.begin(key_id=key_id)
        record.settle(5)
        record.observe(ChoiceDelta(0, token_ids=[1, 2], finish_reason="stop"))
        record.finish()
    assert bench.get("key_tokens_total", key_id="abc", kind="prompt") == 5
    assert bench.get("key_tokens_total", key_id="abc", kind="generation") == 2
    assert bench.get("key_tokens_total", key_id="", kind="prompt") == 0


def test_rejections(bench: Bench) -> None:
    """Guards the overload alert: a refusal counts with its reason and as an outcome."""
    bench.admission.reserve(8)
    with pytest.raises(Exception, match="overloaded"):
        bench.admission.reserve(1)
    assert bench.get("admission_rejections_total", reason="requests") == 1
    assert bench.get("requests_total", outcome="rejected") == 1


def test_methods_are_bounded(bench: Bench) -> None:
    """Guards Prometheus: a caller can make up methods."""
    bench.metrics.responded("/v1/models", "BREW", 405)
    assert bench.get("http_requests_total", route="/v1/models", method="other", status="405") == 1


def test_endpoint(tmp_path: Path) -> None:
    """Guards scrapers: the text parses, every name has the prefix."""
    app = create_app(make_services(write_text_dir(tmp_path)), KeyRing([]))

    async def ask() -> str:
        async with client(app) as http:
            await http.get("/v1/models")
            return (await http.get("/metrics")).text

    families = {family.name: family for family in text_string_to_metric_families(asyncio.run(ask()))}
    assert all(name.startswith("ropeway_") for name in families)
    routes = {sample.labels["route"] for sample in families["ropeway_http_requests"].samples}
    assert routes == {"/v1/models"}


WORKER = """
import sys
from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.server.metrics import RequestMetrics
metrics = RequestMetrics("tiny")
metrics.responded("/v1/models", "GET", 200)
ProcessMetrics(sys.argv[1])
"""
MERGE = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_processes(tmp_path: Path) -> None:
    """Guards the merge: counters add up over processes, and each process has its own memory and CPU series."""
    environ = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-W", "error", "-c", code, *arguments]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout

    run(WORKER, "worker-0")
    run(WORKER, "worker-1")
    merged = run(MERGE)
    assert 'route="/v1/models",status="200"} 2.0' in merged
    for process in ("worker-0", "worker-1"):
        assert f'ropeway_process_resident_memory_bytes{{process="{process}"}}' in merged


async def test_loop_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the alert for a blocked event loop: a callback that blocks is seen as lag."""
    import time

    monkeypatch.setattr(module, "WATCH_S", 0.02)
    metrics = RequestMetrics("tiny", CollectorRegistry())
    task = asyncio.create_task(watch_loop(metrics, ProcessMetrics("test", CollectorRegistry()), lambda: True))
    await asyncio.sleep(0.01)
    time.sleep(0.2)  # blocks the loop on purpose
    await asyncio.sleep(0.03)
    task.cancel()
    lag = metrics.registry.get_sample_value("ropeway_event_loop_lag_seconds_sum", {"model_name": "tiny"})
    assert lag is not None and lag > 0.1


async def test_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the alert for a server that lives and serves nothing: the gauge follows readiness both ways."""
    monkeypatch.setattr(module, "WATCH_S", 0)
    metrics = RequestMetrics("tiny", CollectorRegistry())
    states, seen = [False, True, False], []

    def is_ready() -> bool:
        seen.append(metrics.registry.get_sample_value("ropeway_ready", {"model_name": "tiny"}))
        return states[min(len(seen), len(states)) - 1]

    task = asyncio.create_task(watch_loop(metrics, ProcessMetrics("test", CollectorRegistry()), is_ready))
    while len(seen) < 4:
        await asyncio.sleep(0)
    task.cancel()
    assert seen[1:4] == [0, 1, 0]
