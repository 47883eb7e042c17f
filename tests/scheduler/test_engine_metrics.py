"""Metrics as a scrape sees them; over real processes where processes matter."""

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from ropeway.scheduler.engine_metrics import EngineMetrics, StepRecord
from ropeway.scheduler.scheduler_stats import RowTimes

LABELS = {"model_name": "m"}


def record(**changes: object) -> StepRecord:
    fixed = {"kind": "decode", "seconds": 0.5, "reasons": {}}
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | fixed | changes
    return StepRecord(**values)  # type: ignore[arg-type]


def test_a_step_is_counted_once() -> None:
    """Guards the counters: the engine tells totals, so the same totals again must add nothing."""
    registry = CollectorRegistry()
    metrics = EngineMetrics("m", registry)
    metrics.record(record(tokens=30, prompt_tokens=100, generation_tokens=3, prefix_cache_hits=16, kind="mixed"))
    metrics.record(record(tokens=1, prompt_tokens=100, generation_tokens=4, prefix_cache_hits=16, num_preemptions=1))
    expected = {
        "ropeway_prompt_tokens_total": 100,
        "ropeway_generation_tokens_total": 4,
        "ropeway_prefix_cache_hits_total": 16,
        "ropeway_prefix_cache_queries_total": 0,
        "ropeway_num_preemptions_total": 1,
        "ropeway_iteration_tokens_sum": 31,
        "ropeway_iteration_tokens_count": 2,
    }
    assert {name: registry.get_sample_value(name, LABELS) for name in expected} == expected
    for kind, count in (("decode", 1), ("mixed", 1), ("prefill", 0)):
        name = "ropeway_step_duration_seconds_count"
        assert registry.get_sample_value(name, LABELS | {"kind": kind}) == count


def test_gauges_show_the_last_step_and_nothing_when_idle() -> None:
    """Guards boards against the ghost of the last step."""
    registry = CollectorRegistry()
    metrics = EngineMetrics("m", registry)
    names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "padding_ratio", "batch_occupancy"]
    metrics.record(record(**{name: place + 1 for place, name in enumerate(names)}))
    assert [registry.get_sample_value(f"ropeway_{name}", LABELS) for name in names] == [1, 2, 3, 4, 5]
    metrics.idle()
    assert [registry.get_sample_value(f"ropeway_{name}", LABELS) for name in names] == [0] * 5


def test_reasons_gaps_and_times() -> None:
    """Guards the answers to "why is it slow": what kept rows out, the device without work, where a request waited."""
    registry = CollectorRegistry()
    metrics = EngineMetrics("m", registry)
    metrics.record(record(reasons={"prefill share": 2, "row budget": 1}, host_gap_seconds=0.25))
    metrics.record(record(reasons={"prefill share": 5, "row budget": 1}, host_gap_seconds=0.5))
    metrics.ended(RowTimes(1.0, 2.0, 3.0))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"ropeway_{name}", LABELS | labels)

    assert value("rows_not_planned_total", reason="prefill share") == 5
    assert value("rows_not_planned_total", reason="row budget") == 1
    assert value("rows_not_planned_total", reason="preempted") == 0
    assert (value("host_gap_seconds_sum"), value("host_gap_seconds_count")) == (0.75, 2)
    assert [value(f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")] == [1, 2, 3]


ENGINE = """
from ropeway.scheduler.engine_metrics import EngineMetrics, StepRecord
values = dict.fromkeys(StepRecord.__dataclass_fields__, 7) | {"kind": "decode", "reasons": {}}
EngineMetrics("m").record(StepRecord(**values))
"""
SUPERVISOR = """
import subprocess, sys
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from ropeway.scheduler.engine_metrics import SupervisorMetrics
metrics = SupervisorMetrics("m")
registry = CollectorRegistry()
MultiProcessCollector(registry)
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
engine.wait()
value = lambda name: registry.get_sample_value(f"ropeway_{name}", {"model_name": "m"})
print(value("num_requests_running"), value("generation_tokens_total"), value("engine_restarts_total"))
metrics.engine_died(engine.pid)
metrics.engine_restarted()
print(value("num_requests_running"), value("generation_tokens_total"), value("engine_restarts_total"))
"""


def test_a_dead_engine_runs_nothing(tmp_path: Path) -> None:
    """Guards alerts: the gauges of a dead engine go to 0 at once, its counters stay, the restart is counted."""
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, ENGINE],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["7.0", "7.0", "0.0", "0.0", "7.0", "1.0"]
