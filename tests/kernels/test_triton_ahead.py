"""When launches are gone through ahead, with Triton's entry replaced: compiling itself needs a GPU (tests/gpu)."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropeway.kernels import triton_ahead
from ropeway.kernels.triton_ahead import compile_ahead_on, one_by_one

CUDA = torch.device("cuda")


class Kernel:
    """Launches, and how."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.warmups: list[bool] = []

    def run(self, *args: object, grid: tuple[int, ...], warmup: bool) -> None:
        self.warmups.append(warmup)
        (self.disk / str(args)).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    disk = tmp_path / "cache"
    monkeypatch.setattr(triton_ahead, "JITFunction", Kernel)
    monkeypatch.setattr(triton_ahead, "AsyncCompileMode", lambda threads, ignore_errors: nullcontext())
    monkeypatch.setattr(triton_ahead, "knobs", SimpleNamespace(cache=SimpleNamespace(dir=str(disk))))
    return Kernel(disk)


def test_passes_launch_nothing_while_something_is_new(kernel: Kernel) -> None:
    """Guards first starts: every pass hands over; after it launches are launches again, whatever was raised."""

    def launches() -> None:
        kernel.run(len(kernel.warmups), grid=(1,), warmup=False)
        raise ValueError("not in a pass")

    ahead = compile_ahead_on(CUDA)
    for _ in range(3):
        ahead(launches)
        kernel.run(0, grid=(1,), warmup=False)
    assert kernel.warmups == [True, False] * 3


def test_one_pass_if_all_is_on_disk(kernel: Kernel) -> None:
    """Guards later starts against passes that only cost time."""
    kernel.run(0, grid=(1,), warmup=False)
    ahead = compile_ahead_on(CUDA)
    for _ in range(3):
        ahead(lambda: kernel.run(0, grid=(1,), warmup=False))
    assert kernel.warmups == [False, True]


def test_without_a_gpu(kernel: Kernel) -> None:
    ahead = compile_ahead_on(torch.device("cpu"))
    assert ahead is one_by_one
    ahead(lambda: kernel.run(0, grid=(1,), warmup=False))
    assert kernel.warmups == []
