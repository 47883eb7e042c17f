"""How many blocks fit."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from ropeway.kernels.errors import NotEnoughMemory
from ropeway.kernels.memory import check_weights_fit, kv_budget, plan_blocks

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def machine(monkeypatch: pytest.MonkeyPatch, total: float, available: float) -> None:
    memory = SimpleNamespace(total=int(total * GIB), available=int(available * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize(("total", "available", "expected"), [(32, 30, 8), (32, 5, 4)])
def test_cpu_budget(monkeypatch: pytest.MonkeyPatch, total: float, available: float, expected: float) -> None:
    """Guards the machine: a quarter of it, and less where others use it already."""
    machine(monkeypatch, total, available)
    assert kv_budget(CPU, gpu_memory_utilization=0.9) == expected * GIB


def test_gpu_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the formula: the share is of the whole GPU, and what is in use (by anybody) comes off it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    assert kv_budget(GPU, gpu_memory_utilization=0.9) == pytest.approx((72 - 20) * GIB)


def plan(budget: int, max_num_seqs: int = 4) -> int:
    return plan_blocks(
        budget, bytes_per_block=1000, block_size=16, max_model_len=100, max_num_seqs=max_num_seqs
    )  # 7 blocks per sequence


def test_blocks_fill_the_budget() -> None:
    """Guards the budget: never more than it, the reserved block counted."""
    assert plan(20_999) == 20


def test_no_more_than_can_be_used() -> None:
    """Guards small models: blocks beyond max_num_seqs full sequences are memory nobody can use."""
    assert plan(10**12) == 1 + 4 * 7


def test_one_sequence_must_fit() -> None:
    """Guards preemption: if the oldest row cannot run to its end alone, nobody ever finishes."""
    assert plan(8_000) == 8
    with pytest.raises(NotEnoughMemory, match=r"lower --max-model-len \(to 96 at most\).*--kv-cache-memory-bytes"):
        plan(7_999)
    with pytest.raises(NotEnoughMemory, match="there are 0 bytes: raise --kv-cache-memory-bytes"):
        plan(-5_000)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the machine from a load that ends in the out-of-memory killer, on either device."""
    machine(monkeypatch, 32, 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    check_weights_fit(10 * GIB, CPU)
    check_weights_fit(3 * GIB, GPU)
    with pytest.raises(NotEnoughMemory, match=r"11\.00 GiB and 10\.00 GiB of memory"):
        check_weights_fit(11 * GIB, CPU)
    with pytest.raises(NotEnoughMemory, match=r"3\.00 GiB on the GPU"):
        check_weights_fit(4 * GIB, GPU)
