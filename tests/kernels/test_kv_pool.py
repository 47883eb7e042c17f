"""KVPool: slots, lazily made layers, block copies."""

import torch

from ropeway.kernels.kv_pool import KVPool


def test_layers_take_the_sizes_of_their_first_keys_and_values() -> None:
    """Guards families whose K and V, or whose layers, differ in size: config sizes would be wrong for them."""
    pool = KVPool(num_blocks=3, block_size=4)
    pool.write(0, torch.tensor([5]), torch.ones(1, 2, 8), torch.ones(1, 2, 6))
    pool.write(2, torch.tensor([5]), torch.ones(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 3, dtype=torch.float64))
    assert [tensor.shape for tensor in pool.layer(0)] == [(3, 4, 2, 8), (3, 4, 2, 6)]
    assert [tensor.shape for tensor in pool.layer(2)] == [(3, 4, 1, 3), (3, 4, 1, 3)]
    assert pool.layers == {0, 2}
    assert pool.bytes_per_block == 4 * (2 * (8 + 6) * 4 + (3 + 3) * 8)


def test_write_touches_its_slots_only() -> None:
    """Guards neighbours in the pool: a write outside its slots changes another row's text."""
    pool = KVPool(3, 4, fill=torch.nan)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    slots = torch.tensor([11, 4, 7])
    pool.write(0, slots, k, v)
    for tensor, new in zip(pool.layer(0), (k, v), strict=True):
        flat = tensor.flatten(0, 1)
        assert torch.equal(flat[slots], new)
        assert flat.isnan().flatten(1).all(1).sum() == 12 - 3


def test_block_0_is_finite_from_the_start() -> None:
    """Guards rows that are only padding: what they read must not be NaN by chance."""
    pool = KVPool(2, 4)
    pool.write(0, torch.tensor([4]), torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    assert all((tensor[0] == 0).all() for tensor in pool.layer(0))


def test_copies_read_before_they_write() -> None:
    """Guards copy on write: 1 -> 2 and 2 -> 3 in one step must not send block 1 to block 3."""
    pool = KVPool(4, 2)
    pool.write(0, torch.arange(8), torch.arange(8.0).view(8, 1, 1), -torch.arange(8.0).view(8, 1, 1))
    pool.write(1, torch.arange(8), torch.arange(8.0).view(8, 1, 1) + 10, torch.arange(8.0).view(8, 1, 1) + 20)
    pool.copy_blocks(torch.tensor([[1, 2], [2, 3]], dtype=torch.int32))
    expected = torch.tensor([0.0, 1, 2, 3, 2, 3, 4, 5])
    assert torch.equal(pool.layer(0)[0].flatten(), expected)
    assert torch.equal(pool.layer(0)[1].flatten(), -expected)
    assert torch.equal(pool.layer(1)[0].flatten(), expected + 10)
    pool.copy_blocks(torch.empty(0, 2, dtype=torch.int32))
    assert torch.equal(pool.layer(0)[0].flatten(), expected)
