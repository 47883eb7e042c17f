"""CPU, memory and descriptors of this process."""

import tempfile

import psutil
from prometheus_client import CollectorRegistry

from ropeway.scheduler.process_metrics import ProcessMetrics


def test_figures_of_this_process() -> None:
    """Guards the board: CPU only grows, by what was used; memory and descriptors are those of now."""
    registry = CollectorRegistry()
    metrics = ProcessMetrics("test", registry)

    def get(name: str) -> float:
        value = registry.get_sample_value(f"ropeway_process_{name}", {"process": "test"})
        assert value is not None
        return value

    process = psutil.Process()
    before = get("cpu_seconds_total")
    assert abs(get("resident_memory_bytes") - process.memory_info().rss) < 2**26
    while sum(process.cpu_times()[:2]) < before + 0.05:
        pass
    metrics.update()
    times = process.cpu_times()
    assert before + 0.05 <= get("cpu_seconds_total") <= times.user + times.system
    count = get("open_fds")
    with tempfile.TemporaryFile():
        metrics.update()
        assert get("open_fds") == count + 1
