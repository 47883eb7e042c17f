"""Writing and copying KV blocks in Triton, against `KVPool`."""

import pytest
import torch
from e4m3 import mend_interpreter

pytest.importorskip("triton")

from ropeway.kernels.fp8_cache import Scales
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.triton_cache import copy_blocks, write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("heads", "head", "head_v"), [(2, 16, 16), (3, 24, 16), (1, 5, 8)])
def test_write(heads: int, head: int, head_v: int) -> None:
    """Guards heads and sizes that are no powers of two, transposed K and V, and the slots nobody writes."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(heads, 7, head, generator=generator).transpose(0, 1)
    v = torch.randn(7, heads, head_v, generator=generator)
    slots = torch.randperm(36, generator=generator)[:7]
    pool = KVPool(9, 4, fill=0.0)
    pool.write(0, slots, k, v)
    expected = pool.layer(0)
    pools = [torch.zeros_like(part, device=DEVICE) for part in expected]
    write_kv(*pools, slots.to(DEVICE), k.to(DEVICE), v.to(DEVICE))
    assert all(torch.equal(part.cpu(), right) for part, right in zip(pools, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_in_fp8(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards each pool's scale, and what becomes of large, small, infinite and missing numbers."""
    mend_interpreter(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    size = 2.0 ** torch.randint(-12, 12, (7, 2, 24), generator=generator)
    k, v = ((size * torch.randn(size.shape, generator=generator)).to(dtype) for _ in range(2))
    k[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slots = torch.randperm(36, generator=generator)[:7]
    scales = Scales(0.5, 8.0)
    pool = KVPool(9, 4, fill=0.0, scales={0: scales})
    pool.write(0, slots, k, v)
    expected = pool.layer(0)
    assert expected[0].float().nan_to_num().max() == 448 and expected[0].isnan().sum() == 3
    pools = [torch.zeros_like(part, device=DEVICE) for part in expected]
    write_kv(*pools, slots.to(DEVICE), k.to(DEVICE), v.to(DEVICE), scales)
    for part, right in zip(pools, expected, strict=True):
        torch.testing.assert_close(part.cpu().float(), right.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks(dtype: torch.dtype) -> None:
    """Guards layers that differ in size, and the order: a block that is source and destination is read first."""
    generator = torch.Generator().manual_seed(2)
    before = [torch.randn(9, 16, 5, size, generator=generator).to(DEVICE, dtype) for size in (20, 20, 24)]
    pools = [pool.clone() for pool in before]
    copy_blocks(pools, torch.tensor([[1, 2], [2, 3], [5, 1]], dtype=torch.int32, device=DEVICE))
    for pool, old in zip(pools, before, strict=True):
        old[[2, 3, 1]] = old[[1, 2, 5]]
        assert torch.equal(pool, old)


@pytest.mark.parametrize("numbers", [4, 12, 1030])
def test_copy_odd_blocks(numbers: int) -> None:
    """Guards a cache in FP8 with blocks of one token and few small heads: its blocks are no multiple of 8 bytes."""
    generator = torch.Generator().manual_seed(4)
    before = torch.randint(256, (9, 1, 1, numbers), generator=generator).to(DEVICE, torch.uint8)
    pool = before.clone()
    copy_blocks([pool], torch.tensor([[1, 2], [2, 3], [5, 1]], dtype=torch.int32, device=DEVICE))
    before[[2, 3, 1]] = before[[1, 2, 5]]
    assert torch.equal(pool, before)
