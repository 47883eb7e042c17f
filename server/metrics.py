"""What the API worker measures, and `GET /metrics`, which merges all processes. Knows no prompts and no tokens' ids.

With PROMETHEUS_MULTIPROC_DIR set (by the supervisor, before any child starts) values live in files that every process
of the server shares; without it, in tests, in this process alone. Unbounded values never become labels.
"""

import asyncio
import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.responses import Response

from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.server.admission import RejectReason, Ticket
from ropeway.server.request import ChoiceDelta
from ropeway.server.tally import Tally

if TYPE_CHECKING:
    from ropeway.server.services import Services

Outcome = Literal["stop", "length", "error", "disconnected", "timeout", "rejected"]

# vLLM's buckets, so that boards made for it fit. Source: its documentation of metrics.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
N = (1, 2, 5, 10, 20)
WATCH_S = 0.5
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


class RequestMetrics:
    """Every metric of the HTTP side, labelled with the model's name.

    Args:
        model_name: the label.
        registry: where the metrics live; a fresh one per test.
    """

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.model_name = model_name
        self.requests = self._counter("requests", "Requests that ended, by outcome.", "outcome")
        self.rejections = self._counter("admission_rejections", "Requests not admitted, by reason.", "reason")
        self.http = self._counter("http_requests", "HTTP responses.", "route", "method", "status")
        self.key_tokens = self._counter("key_tokens", "Tokens per key.", "key_id", "kind")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        itl = self._histogram("inter_token_latency_seconds", "Between two outputs of a choice.", ITL_S)
        self.itl = Tally(itl, ITL_S)
        self.tpot = self._histogram("request_time_per_output_token_seconds", "Mean per choice after its first.", ITL_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_S)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.generation_tokens = self._histogram("request_generation_tokens", "Output tokens per request.", TOKENS)
        self.params_n = self._histogram("request_params_n", "Choices per request.", N)
        self.parse_failures = self._counter(
            "tool_parse_failures", "Tool calls that were none, and arguments that are no JSON."
        ).labels(model_name)
        self.ready = Gauge(
            "ropeway_ready",
            "1 while tokens can come out, 0 otherwise; the least ready API worker counts.",
            ("model_name",),
            registry=self.registry,
            multiprocess_mode="livemin",
        ).labels(model_name)
        self.loop_lag = self._histogram("event_loop_lag_seconds", "How late the event loop wakes up.", LAG_S)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ropeway_{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        parent = Histogram(f"ropeway_{name}", text, ("model_name",), registry=self.registry, buckets=buckets)
        return parent.labels(self.model_name)

    def begin(self, scope: MutableMapping[str, Any], n: int, ticket: Ticket) -> "RequestRecord":
        """The record of an admitted request; arrival and key are those that the middleware put into the scope."""
        state = scope.get("state", {})
        self.params_n.observe(n)
        record = RequestRecord(self, ticket, n, state.get("key_id", ""), state.get("arrival", time.monotonic()))
        state["record"] = record
        return record

    def rejected(self, reason: RejectReason) -> None:
        """A request that was not admitted."""
        self.rejections.labels(self.model_name, reason).inc()
        self.requests.labels(self.model_name, "rejected").inc()

    def responded(self, route: str, method: str, status: int) -> None:
        """An HTTP response went out; `route` is the template, never the raw path."""
        known = method if method in METHODS else "other"
        self.http.labels(self.model_name, route, known, str(status)).inc()


@dataclass(slots=True)
class _ChoiceTimes:
    first: float
    last: float
    tokens: int


@dataclass(slots=True)
class RequestRecord:
    """One admitted request: its place in the queue, its times and its tokens. The stream layer calls it.

    It costs no histogram observation before its end but one, see `Tally`.
    """

    metrics: RequestMetrics
    ticket: Ticket
    n: int
    key_id: str
    arrival: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    """Monotonic seconds."""
    outcome: Outcome | None = None
    """None while the request runs."""
    finish_reasons: set[str] = field(default_factory=set)
    _choices: dict[int, _ChoiceTimes] = field(default_factory=dict)

    def settle(self, prompt_tokens: int) -> None:
        """The prompts are tokenized; all prompts of the request together, each counted once whatever n is.

        Raises: ApiError 503 if the queue cannot hold so many.
        """
        self.ticket.settle(prompt_tokens)
        self.prompt_tokens = prompt_tokens

    def observe(self, delta: ChoiceDelta) -> None:
        """Whatever a choice gained in one wake-up."""
        now = time.monotonic()
        self.cached_tokens += delta.cached_tokens
        if delta.token_ids:
            self._observe_tokens(delta.index, len(delta.token_ids), now)
        if delta.finish_reason is not None:
            self.finish_reasons.add(delta.finish_reason)
            times = self._choices.pop(delta.index, None)
            if times is not None and times.tokens > 1:
                self.metrics.tpot.observe((times.last - times.first) / (times.tokens - 1))

    def _observe_tokens(self, index: int, count: int, now: float) -> None:
        self.output_tokens += count
        if self.first_token is None:
            self.first_token = now
            self.ticket.started()
            self.metrics.ttft.observe(now - self.arrival)
        times = self._choices.get(index)
        if times is None:
            self._choices[index] = _ChoiceTimes(now, now, count)
            return
        self.metrics.itl.observe(now - times.last)
        times.last = now
        times.tokens += count

    def finish(self, outcome: Outcome | None = None) -> None:
        """The request is over; without an outcome its choices say which. Idempotent: the first call counts."""
        if self.outcome is not None:
            return
        self.outcome = outcome or ("length" if "length" in self.finish_reasons else "stop")
        self.ticket.release()
        metrics = self.metrics
        metrics.requests.labels(metrics.model_name, self.outcome).inc()
        metrics.itl.flush()
        metrics.e2e.observe(time.monotonic() - self.arrival)
        metrics.prompt_tokens.observe(self.prompt_tokens)
        metrics.generation_tokens.observe(self.output_tokens)
        if self.key_id:
            metrics.key_tokens.labels(metrics.model_name, self.key_id, "prompt").inc(self.prompt_tokens)
            metrics.key_tokens.labels(metrics.model_name, self.key_id, "generation").inc(self.output_tokens)


async def watch_loop(metrics: RequestMetrics, process: ProcessMetrics, is_ready: Callable[[], bool]) -> None:
    """Measures for ever how late the event loop wakes up, and refreshes readiness and this process's figures."""
    loop = asyncio.get_running_loop()
    while True:
        metrics.ready.set(is_ready())
        due = loop.time() + WATCH_S
        await asyncio.sleep(WATCH_S)
        metrics.loop_lag.observe(max(loop.time() - due, 0.0))
        metrics.itl.flush()
        process.update()


def create_router(services: "Services") -> APIRouter:
    """GET /metrics, all processes merged. A worker's thread does it: it reads a file per process and metric kind."""
    router = APIRouter(tags=["operations"])

    @router.get("/metrics")
    def metrics() -> Response:
        registry = services.metrics.registry
        if MULTIPROCESS_DIR in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
