"""The KV cache in FP8 (e4m3): how K and V are rounded to it, by which scales, and where that works.

e4m3 is a floating format: over 15 powers of two a number keeps 4 bits wherever it lies, so a scale has to keep numbers
inside of that range and need not fit them. One per layer for K and one for V do, fixed before the first request, from
what a few tokens of the start-up probe made: their largest number is stored as one of [32, 64), so that others may be
7 times as large before they saturate at 448, and numbers 2,000 times as small still keep all their bits. Scales are
powers of two: scaling rounds nothing, and no row changes what another one stores. Knows tensors, no model.
"""

import math
from dataclasses import dataclass

import torch

from ropeway.kernels.errors import UnsupportedSetting
from ropeway.kernels.fp8 import FP8, LARGEST

STORED_PEAK = 6
"""The largest number that was seen is stored below 2 to this."""


@dataclass(slots=True, frozen=True)
class Scales:
    """What a layer's pools hold is K / k and V / v."""

    k: float = 1.0
    v: float = 1.0


def scales_of(k: torch.Tensor, v: torch.Tensor) -> Scales:
    """Scales of a layer, from pools in which some tokens are written and the rest is NaN."""
    return Scales(*(_scale(pool.float().nan_to_num(nan=0.0).abs().max().item()) for pool in (k, v)))


def _scale(peak: float) -> float:
    return 2.0 ** (math.frexp(peak)[1] - STORED_PEAK) if 0 < peak < math.inf else 1.0


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale in e4m3, saturated; what is not finite becomes NaN, so that a row that went wrong is noticed."""
    x = x.float() / scale
    return torch.where(x.isfinite(), x.clamp(-LARGEST, LARGEST), torch.nan).to(FP8)


def restored(stored: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """What `rounded` was given, but for rounding; pools of another dtype hold it as it is."""
    return stored.to(dtype) * scale if stored.dtype == FP8 else stored


def put(pool: torch.Tensor, slots: torch.Tensor, new: torch.Tensor, scale: float) -> None:
    """pool[slot] = new, rounded if the pool [num_blocks,block_size,H,D] is in FP8: slots [N] int64, new [N,H,D]."""
    flat = pool.flatten(0, 1)
    if pool.dtype == FP8:  # torch has no index_copy_ for it
        flat, new = flat.view(torch.uint8), rounded(new, scale).view(torch.uint8)
    flat.index_copy_(0, slots, new)


def check_fp8_cache(device: str) -> None:
    """Raises UnsupportedSetting where Triton has no e4m3; device: auto, cpu, cuda or cuda:N."""
    if device == "cpu" or not torch.cuda.is_available():
        return
    if torch.cuda.get_device_capability(None if device == "auto" else torch.device(device)) < (8, 9):
        raise UnsupportedSetting("--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or newer.")
