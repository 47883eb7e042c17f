"""CUDA graphs of whole steps: which sizes there are, which are captured, and how one is captured and replayed.

A step of a captured size is two launches: the forward's graph and the sampler's. Both read and write memory at fixed
addresses only (`Staging`'s static tensors, the logits' buffer). Knows sizes and launches, no model and no row.

    decode   tokens == rows: every row computes one token
    mixed    chunks and decode rows together: sizes close together up to `DENSE` tokens, for a small model a few beyond

All graphs share one memory pool, the largest captured first: only one runs at a time, and what one leaves there the
next may overwrite.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ropeway.kernels.staging import Size

logger = logging.getLogger("ropeway.engine")

DENSE, LARGEST_MIXED = 2048, 8192
"""Tokens. Between them each size is twice the one before."""
LONG_STEP = 12e12
"""Parameters x tokens of a step that takes a large GPU 40 ms of products: as long as Python may take to launch its
kernels one by one. A larger step needs no graph."""
WASTE = 2
"""A step takes the next larger captured size if that is at most so many times as large as the one it should have."""
FEW_PADS = 1 / 16
"""Of the tokens of a size beyond `DENSE`: with more pads a step runs as it is."""

Launches = Callable[[], object]


class Uncapturable(Exception):
    """The model's code does something that a graph cannot hold; the message is the library's."""


class Capture(Protocol):
    """Makes launches repeatable."""

    def __call__(self, launches: Launches) -> Launches:
        """Runs `launches` once as they are, then captures them; returns what replays them. Raises Uncapturable."""


class CudaCapture:
    """Captures into CUDA graphs that share a memory pool.

    What waits for the device cannot be captured, and a capture that fails in its middle leaves torch's allocator in a
    state that may end the process later (fixed in torch 2.12). So the first, plain run already refuses to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launches: Launches) -> Launches:
        torch.cuda.synchronize(self._stream.device)
        try:
            with _refusing_to_wait():
                launches()
            torch.cuda.synchronize(self._stream.device)
            graph = self._captured(launches)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise Uncapturable(str(error)) from error
        torch.cuda.synchronize(self._stream.device)
        return graph.replay

    def _captured(self, launches: Launches) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which gives all cached memory back to the device before every capture.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launches()
            finally:
                graph.capture_end()
        return graph


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Within it torch raises RuntimeError where it would wait for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(slots=True, frozen=True)
class StepGraph:
    """One size, captured."""

    size: Size
    forward: Launches
    samplers: dict[str, Launches]
    """By kind of batch."""


class StepGraphs:
    """The captured sizes, and those that will be.

    Args:
        sizes: all there may be.
        capture: captures one size.
    """

    def __init__(self, sizes: Sequence[Size], capture: Callable[[Size], StepGraph]) -> None:
        self.sizes = sorted(sizes)
        self.captured: dict[Size, StepGraph] = {}
        self.refusal: str | None = None
        """Why there are no more of them, if a capture has failed: the library's words."""
        self._capture = capture

    def find(self, size: Size) -> StepGraph | None:
        """The graph that a step of this size should take; None = none, it runs plainly."""
        wanted = _fitting(size, self.sizes)
        if wanted is None or (wanted.tokens > DENSE and wanted.tokens - size.tokens > FEW_PADS * wanted.tokens):
            return None
        if wanted in self.captured:
            return self.captured[wanted]
        instead = _fitting(size, sorted(self.captured))
        return None if instead is None or instead.tokens > WASTE * wanted.tokens else self.captured[instead]

    def add(self, size: Size) -> None:
        """Capture this size, if it is not yet. If that fails, what is captured is all there will be."""
        if size in self.captured or size not in self.sizes:
            return
        try:
            self.captured[size] = self._capture(size)
        except (Uncapturable, torch.OutOfMemoryError) as error:
            self.refusal = str(error).strip().splitlines()[0]
            self.sizes = sorted(self.captured)
            logger.warning("no CUDA graphs but for %d sizes: %s", len(self.sizes), self.refusal)

    def add_next(self) -> bool:
        """Capture the largest size that is missing; False if none is."""
        missing = [size for size in self.sizes if size not in self.captured]
        if missing:
            self.add(max(missing))
        return bool(missing)


def _fitting(size: Size, among: Sequence[Size]) -> Size | None:
    """The smallest of these, in ascending order, with room for such a step and for a row of pads if it has tokens to
    spare. Steps of decode rows alone take the sizes made for them."""
    decode = size.tokens == size.rows
    for other in among:
        if other.tokens < size.tokens or other.rows < size.rows or decode != (other.tokens == other.rows):
            continue
        if decode or other.tokens == size.tokens or other.rows > size.rows:
            return other
    return None


def decode_sizes(max_rows: int) -> list[Size]:
    """1, 2, 4, 8, then ever wider steps, up to max_rows."""
    counts: list[int] = []
    rows = 1
    while rows < max_rows:
        counts.append(rows)
        rows += rows if rows < 8 else 8 if rows < 64 else 16 if rows < 256 else 64
    return [Size(rows, rows) for rows in [*counts, max_rows]]


def mixed_sizes(max_rows: int, max_tokens: int, num_parameters: int) -> list[Size]:
    """128 tokens and more in steps of at most a half, each for some and for all rows; beyond `DENSE` doubled, up to
    max_tokens.

    With all of max_rows there is one row more, for the pads."""
    counts: list[int] = []
    tokens = 128
    while tokens <= DENSE and (not counts or counts[-1] < max_tokens):
        counts.append(tokens)
        tokens += max(64, 1 << (tokens.bit_length() - 3))
    largest = min(max_tokens, LARGEST_MIXED)
    while counts[-1] < largest and (tokens := min(2 * counts[-1], largest)) * num_parameters <= LONG_STEP:
        counts.append(tokens)
    rows = [count for count in (64, 256) if count < max_rows] + [max_rows + 1]
    return [Size(tokens, count) for tokens in counts for count in rows if count < tokens]


def first_sizes(sizes: Sequence[Size]) -> list[Size]:
    """Those without which a server is slow, the largest first: mixed ones of each number of tokens, for most rows, and
    decode steps of every power of two and of all rows. A row of pads costs little; a mixed step without a graph takes
    Python 20 ms, and there is no next larger size for it among few."""
    decode = [size for size in sizes if size.tokens == size.rows]
    first = [size for size in decode if size == max(decode) or _is_power_of_two(size.rows)]
    mixed = {size.tokens: size for size in sorted(sizes) if size.tokens > size.rows}
    return sorted(first + list(mixed.values()), reverse=True)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
