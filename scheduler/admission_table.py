"""AdmissionTable: what every API worker has in flight, in memory that all of them share. Knows no limit, no request.

A file of the private directory, mapped by the supervisor and every API worker: one line of 64 bytes (a cache line) per
worker, each `Column` one int64.

    bytes      0..7    8..15    16..23        24..31         32..39   40..63
    line i     slots   tokens   freed slots   freed tokens   loaded   unused

Nothing is locked. A line is written by its worker alone; the supervisor clears it between that worker's death and the
start of the next one on it. Everybody reads all lines, and an aligned word of 8 bytes is stored and loaded whole.

The price: a worker looks at the sums and then writes its own line, some microseconds later and with nothing awaited in
between. In that time each other worker may have taken in one request that it did not see, and no second one: for that
the other would have looked again, and have seen what came before. So with W workers a sum is above its limit by at most
W - 1 requests.
"""

import mmap
from enum import IntEnum

LINE_BYTES = 64
_WORDS = LINE_BYTES // 8


class Column(IntEnum):
    """What a line tells of its worker. The freed ones only grow, also when the line gets another worker."""

    SLOTS = 0
    """Choices in flight."""
    TOKENS = 1
    """Prompt tokens that wait for their first output."""
    FREED_SLOTS = 2
    """Slots given back since the server's start."""
    FREED_TOKENS = 3
    """Prompt tokens that began to be answered, or were given up, since the server's start."""
    LOADED = 4
    """1 once the worker can serve the model."""


_OF_THE_LIVING = (Column.SLOTS, Column.TOKENS, Column.LOADED)


class AdmissionTable:
    """The lines of all API workers. Made by `create`, `open` or `private`."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._words = memoryview(memory).cast("q")

    @classmethod
    def create(cls, directory: str, lines: int) -> "AdmissionTable":
        """A table of zeros for `open`; the supervisor makes it before any worker starts. Raises OSError."""
        with open(_path(directory), "xb") as file:
            file.write(bytes(LINE_BYTES * max(lines, 1)))  # an empty file cannot be mapped
        return cls.open(directory)

    @classmethod
    def open(cls, directory: str) -> "AdmissionTable":
        """The table that the supervisor made there. Raises OSError."""
        with open(_path(directory), "r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0))

    @classmethod
    def private(cls) -> "AdmissionTable":
        """One line that no other process sees."""
        return cls(mmap.mmap(-1, LINE_BYTES))

    def get(self, line: int, column: Column) -> int:
        """One worker's entry."""
        return self._words[line * _WORDS + column]

    def add(self, line: int, column: Column, amount: int) -> None:
        """Changes one's own entry."""
        self._words[line * _WORDS + column] += amount

    def total(self, column: Column) -> int:
        """Sum over all workers."""
        return sum(self._words[column::_WORDS])

    def clear(self, line: int) -> None:
        """The line's worker is dead: nothing of it is in flight any more."""
        for column in _OF_THE_LIVING:
            self._words[line * _WORDS + column] = 0


def _path(directory: str) -> str:
    return f"{directory}/admission"
