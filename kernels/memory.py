"""How many KV blocks there are. Arithmetic on bytes; asks the device only how much it has, and how much work takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from ropeway.kernels.errors import NotEnoughMemory

CPU_SHARE = 0.25
"""Of the machine's memory, for the KV cache, unless a size is given."""

CPU_AVAILABLE_SHARE = 0.8
"""Of the memory that is available now, at most."""


GPU_WEIGHTS_SHARE = 0.7
"""Of a GPU's free memory, for weights that may stay elsewhere; KV cache and activations want some too."""


def kv_budget(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that the KV cache may take; call it when weights are loaded and one forward has run.

    On a GPU: total * gpu_memory_utilization - what is in use. On a CPU: a quarter of the machine's memory, and never
    more than 80% of what is available.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * gpu_memory_utilization) - (total - free)
    memory = psutil.virtual_memory()
    return int(min(CPU_SHARE * memory.total, CPU_AVAILABLE_SHARE * memory.available))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that this work holds at once on a GPU, beyond what is allocated before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def plan_blocks(budget: int, *, bytes_per_block: int, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """KV blocks in the pool, the reserved block 0 included: what `budget` bytes hold, and no more than can be used.

    Raises:
        NotEnoughMemory: not even one sequence of max_model_len tokens fits.
    """
    per_sequence = -(-max_model_len // block_size)
    blocks = min(budget // bytes_per_block, 1 + max_num_seqs * per_sequence)
    if blocks < 1 + per_sequence:
        needed, most = (1 + per_sequence) * bytes_per_block, (budget // bytes_per_block - 1) * block_size
        shorter = f"lower --max-model-len (to {most} at most), or " if most > 0 else ""
        raise NotEnoughMemory(
            f"One sequence of {max_model_len} tokens needs {_size(needed)} of KV cache and there are {_size(budget)}: "
            f"{shorter}raise --kv-cache-memory-bytes or, on a GPU, --gpu-memory-utilization."
        )
    return blocks


def check_weights_fit(needed: int, device: torch.device) -> None:
    """Raises NotEnoughMemory if `needed` bytes of weights are more than the device has free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        where = "on the GPU" if device.type == "cuda" else "of memory"
        raise NotEnoughMemory(
            f"The weights need {_size(needed)} and {_size(free)} {where} are free: take a smaller --dtype, a smaller "
            "model or a larger machine."
        )


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Raises NotEnoughMemory, a sentence of both, instead of what torch raises on a GPU or a CPU that is full."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if full:
            raise NotEnoughMemory(f"{what}: {remedy}.") from None
        raise


def shared_memory(device: torch.device) -> dict[int | str, int]:
    """Bytes that weights may take on this GPU and in the machine's memory, as accelerate wants them: no other GPU."""
    free = torch.cuda.mem_get_info(device)[0]
    cpu = int(CPU_AVAILABLE_SHARE * psutil.virtual_memory().available)
    return {device.index or 0: int(GPU_WEIGHTS_SHARE * free), "cpu": cpu}


def _size(size: int) -> str:
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{max(size, 0)} bytes"
