"""Counting here gives what observing there gives."""

import random

from prometheus_client import CollectorRegistry, Histogram

from ropeway.server.tally import Tally

BOUNDS = (0.01, 0.5, 2.0)


def histogram() -> tuple[CollectorRegistry, Histogram]:
    registry = CollectorRegistry()
    return registry, Histogram("h", "text", ("name",), registry=registry, buckets=BOUNDS).labels("x")


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    found = {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
    }
    return {key: round(value, 9) for key, value in found.items() if key[0] != "h_created"}


def test_a_tally_is_a_histogram() -> None:
    """Guards the private half of prometheus_client that a tally writes to: bounds included, sums, several flushes."""
    (plain_registry, plain), (tally_registry, counted) = histogram(), histogram()
    tally = Tally(counted, BOUNDS)
    rng = random.Random(3)
    for value in [*BOUNDS, 0.0, 100.0, *(rng.random() * 3 for _ in range(50))]:
        plain.observe(value)
        tally.observe(value)
        if rng.random() < 0.2:
            tally.flush()
    assert samples(tally_registry) != samples(plain_registry)
    tally.flush()
    tally.flush()
    assert samples(tally_registry) == samples(plain_registry)
