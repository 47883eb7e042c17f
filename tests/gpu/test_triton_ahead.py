"""Kernels compiled in threads before their first launch, on a GPU. By hand."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

import triton

from ropeway.kernels.triton_ahead import compile_ahead_on
from ropeway.kernels.triton_jit import jit, tl

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@jit()
def add(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) + N)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """With an empty cache: of each kernel that is compiled or found there, whether it was found."""
    found: list[bool] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **about: found.append(cache_hit))
    return found


def test_compiled_once_and_launched_later(compiled: list[bool]) -> None:
    """Guards what a launch sees: nothing is written ahead, everything afterwards, and nothing is compiled twice."""
    x, y = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)

    def launches() -> None:
        add[(1,)](x, y, N=32)
        add[(1,)](x, y, N=64)
        add[(1,)](x, y, N=64)

    compile_ahead_on(DEVICE)(launches)
    assert y.eq(0).all() and compiled == [False, False]
    launches()
    assert y.eq(65).all()
    assert compiled == [False, False]


def test_a_pass_that_fails_changes_nothing(compiled: list[bool]) -> None:
    """Guards starts: what goes wrong ahead is no error yet."""
    x, y = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)

    def fail() -> None:
        add[(1,)](x, y, N=3)
        raise ValueError

    compile_ahead_on(DEVICE)(fail)
    add[(1,)](x, y, N=16)
    assert y.eq(17).all()
    with pytest.raises(triton.CompilationError):
        add[(1,)](x, y, N=3)
