"""Triton where there is one: without it the kernels' modules import all the same, and a launch says what is missing.

`TRITON_INTERPRET=1`, set before the first import, runs every kernel on the CPU in Triton's interpreter.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

__all__ = [
    "ceil_div",
    "gdc_launch_dependents",
    "gdc_wait",
    "jit",
    "launch_options",
    "next_power_of_2",
    "starts_early",
    "tl",
    "upload",
]


class _Missing:
    """Stands for a kernel on machines without Triton."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise RuntimeError("The GPU kernels need Triton, which is not installed; it comes with PyTorch's CUDA builds.")


def jit(run_time: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; `run_time` names integers whose value must not lead to another compilation."""

    def wrap(function: Callable[..., Any]) -> Any:
        return _Missing() if triton is None else triton.jit(function, do_not_specialize=list(run_time))

    return wrap


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one in front of it has ended (programmatic dependent launch).

    Its programs then start while the last of the other's still run. A kernel that is launched so must wait
    (`gdc_wait`) before it reads or writes anything; one that waits and then calls `gdc_launch_dependents` lets the
    next such kernel start as early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(early: bool) -> dict[str, bool]:
    """What a launch says so that its kernel `starts_early`; nothing, where Triton may not know the word."""
    return {"launch_pdl": True} if early else {}


def ceil_div(a: int, b: int) -> int:
    """The least integer that is not below a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
