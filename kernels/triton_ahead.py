"""Compiles kernels many at a time before they are first launched: what a first start waits for.

A kernel takes Triton a second or five, most of it outside Python's lock, and a launch waits for its own. So launches
are gone through once before their time, without launching anything: each only hands its kernel to a thread. What a
kernel would have written stays as it was, so nothing may be made of the results.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

try:
    from triton import AsyncCompileMode, JITFunction, knobs
except ImportError:  # none, or one that cannot: kernels are compiled as they are launched
    AsyncCompileMode = JITFunction = knobs = None

logger = logging.getLogger("ropeway.engine")

THREADS = 16
"""At most: a step has no more kernels than that."""

Launches = Callable[[], object]
CompileAhead = Callable[[Launches], None]
"""Compiles in threads what these launches would launch; they must not wait for the device. Never raises: what fails
here fails, or does not, where it is launched."""


def one_by_one(launches: Launches) -> None:
    """A `CompileAhead` that leaves each kernel to its first launch."""


def compile_ahead_on(device: torch.device) -> CompileAhead:
    """For one start on this device."""
    return _Ahead() if device.type == "cuda" and AsyncCompileMode is not None else one_by_one


class _Ahead:
    """A `CompileAhead` of real threads."""

    def __init__(self) -> None:
        self._kernels_before: int | None = None

    def __call__(self, launches: Launches) -> None:
        """Nothing, once a pass found that an earlier start had compiled it all: passes take time, too."""
        if self._kernels_before == _kernels_on_disk():
            return
        if self._kernels_before is None:
            self._kernels_before = _kernels_on_disk()
        try:
            with _only_compiling():
                launches()
        except Exception:
            logger.debug("kernels are compiled as they are launched", exc_info=True)


@contextmanager
def _only_compiling() -> Iterator[None]:
    """Within it a launch hands its kernel over, unless it is compiled, and launches nothing; at its end all are
    compiled, but for those that cannot be."""
    run = JITFunction.run

    def hand_over(kernel: Any, *args: Any, warmup: bool, **options: Any) -> object:
        return run(kernel, *args, warmup=True, **options)

    threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "compiler")
    with threads, AsyncCompileMode(threads, ignore_errors=True), patch.object(JITFunction, "run", hand_over):
        yield


def _kernels_on_disk() -> int:
    """Folders in Triton's cache, one for each kernel and what belongs to it."""
    try:
        return len(os.listdir(knobs.cache.dir))
    except FileNotFoundError:
        return 0
