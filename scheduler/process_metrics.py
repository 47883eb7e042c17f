"""CPU, memory and descriptors of one process of the server, labelled `process`.

prometheus_client leaves its own process metrics out in multiprocess mode. Every process updates its own series; the
live ones go when the supervisor marks the process dead.
"""

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge


class ProcessMetrics:
    """Call `update` about once a second.

    Args:
        name: value of the label, "engine" for example.
        registry: where the metrics live.
    """

    def __init__(self, name: str, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self._process = psutil.Process()
        self._seen = 0.0
        self._cpu = Counter(
            "ropeway_process_cpu_seconds", "CPU time, user and system.", ["process"], registry=registry
        ).labels(name)
        self._memory = Gauge(
            "ropeway_process_resident_memory_bytes",
            "Resident memory.",
            ["process"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        ).labels(name)
        self._descriptors = Gauge(
            "ropeway_process_open_fds",
            "Open file descriptors.",
            ["process"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        ).labels(name)
        self.update()

    def update(self) -> None:
        """Reads the figures of this process; about 0.1 ms."""
        times = self._process.cpu_times()
        cpu = times.user + times.system
        self._cpu.inc(cpu - self._seen)
        self._seen = cpu
        self._memory.set(self._process.memory_info().rss)
        self._descriptors.set(self._process.num_fds())
