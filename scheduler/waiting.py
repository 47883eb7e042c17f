"""The waiting queue: rows in the order in which they will be admitted. Knows the order, not whether there is room.

The order is `Row.rank`: priority, then arrival. A preempted row keeps its arrival, so it comes first among equals.
Another policy (a fair share between keys) is another order; nothing outside this file depends on it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from ropeway.scheduler.row import Row


class Waiting:
    """A sorted list: thousands of rows move in microseconds, and the next ones can be looked at without a pop."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """First to be admitted first. Don't add or remove while iterating."""
        return iter(self._rows)

    def add(self, row: Row) -> None:
        insort(self._rows, row, key=_rank)

    def remove(self, row: Row) -> None:
        index = bisect_left(self._rows, _rank(row), key=_rank)
        assert self._rows[index] is row
        del self._rows[index]


def _rank(row: Row) -> tuple[int, float, int, int]:
    return row.rank
