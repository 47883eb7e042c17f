"""A histogram that counts here and tells Prometheus now and then. Knows no metric's name.

prometheus_client keeps the values of several processes in mapped files: 2 us per observation, for which a stream of
tokens has no time. Not thread-safe: one event loop observes and flushes.
"""

import math
from bisect import bisect_left

from prometheus_client import Histogram


class Tally:
    """Observations on their way into `histogram`.

    Args:
        histogram: one with its labels set.
        bounds: its upper bounds, without infinity.
    """

    __slots__ = ("_bounds", "_counts", "_histogram", "_sum")

    def __init__(self, histogram: Histogram, bounds: tuple[float, ...]) -> None:
        self._histogram = histogram
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def flush(self) -> None:
        """Hands over what was counted. As `Histogram.observe` does, whose buckets are its own: it has no plural."""
        for place, count in enumerate(self._counts):
            if count:
                self._histogram._buckets[place].inc(count)
                self._counts[place] = 0
        self._histogram._sum.inc(self._sum)
        self._sum = 0.0
