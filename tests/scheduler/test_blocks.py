"""Blocks: three states, one owner count, an index that finds only what was published."""

import random
from collections.abc import Callable

import pytest

from ropeway.scheduler.blocks import BlockPool

LABELS = ("key", "salt")


def hashes_of(pool: BlockPool, tokens: list[int], labels: tuple[str, ...] = LABELS) -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, tokens, labels)
    return hashes


def publish(pool: BlockPool, tokens: list[int], labels: tuple[str, ...] = LABELS) -> list[int]:
    """Blocks that hold `tokens`, owned once and findable."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    hashes = hashes_of(pool, tokens, labels)
    pool.publish(blocks[: len(hashes)], hashes)
    return blocks


def test_block_zero_is_never_handed_out() -> None:
    """Guards the block that pads write to."""
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_available, pool.num_usable, pool.usage) == (0, 4, 1.0)


def test_blocks_for_rounds_up() -> None:
    """Guards the last, partial block."""
    pool = BlockPool(5, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_released_blocks_are_found_until_their_memory_is_wanted() -> None:
    """Guards the prefix cache between requests."""
    pool = BlockPool(4, 2)
    blocks = publish(pool, [1, 2, 3, 4])
    pool.release(blocks)
    pool.check_integrity([])
    assert pool.num_available == 3
    assert pool.find(hashes_of(pool, [1, 2, 3, 4, 5, 6])) == blocks
    taken = pool.allocate(1)  # the free one goes first
    assert not set(taken) & set(blocks)
    assert pool.find(hashes_of(pool, [1, 2, 3, 4])) == blocks


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    """Guards eviction: a beginning without its end is useful, an end without its beginning is lost memory."""
    pool = BlockPool(4, 2)
    blocks = publish(pool, [1, 2, 3, 4, 5, 6])
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.find(hashes_of(pool, [1, 2, 3, 4, 5, 6])) == blocks[:2]


def test_the_least_recently_used_sequence_is_forgotten_first() -> None:
    """Guards a hot prefix against eviction: each use makes it the youngest again."""
    pool = BlockPool(5, 2)
    hot, cold = publish(pool, [1, 2, 3, 4]), publish(pool, [5, 6, 7, 8])
    pool.release(hot)
    pool.release(cold)
    pool.share(hot)
    pool.release(hot)
    assert sorted(pool.allocate(2)) == sorted(cold)
    assert pool.find(hashes_of(pool, [1, 2, 3, 4])) == hot


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    """Guards forks and hits: a block must not be reused while one row still reads it."""
    pool = BlockPool(3, 2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_available == 1
    pool.check_integrity([blocks])
    pool.release(blocks)
    assert pool.num_available == 2
    pool.check_integrity([])


def test_unowned_blocks_are_counted_once() -> None:
    """Guards admission: a cached block that is shared is no longer available for anything else."""
    pool = BlockPool(5, 2)
    mine, cached = publish(pool, [1, 2]), publish(pool, [3, 4])
    pool.release(cached)
    assert pool.num_unowned(mine + cached) == 1
    pool.share(cached)
    assert pool.num_available == 2


def test_a_digest_covers_everything_before_it() -> None:
    """Guards against serving the K and V of another beginning."""
    pool = BlockPool(20, 2)
    publish(pool, [1, 2, 3, 4])
    assert pool.find(hashes_of(pool, [9, 9, 3, 4])) == []
    assert len(pool.find(hashes_of(pool, [1, 2, 9, 9]))) == 1


def test_labels_separate_caches() -> None:
    """Guards tenants against timing each other's prompts; two labels never run into one."""
    pool = BlockPool(20, 2)
    publish(pool, [1, 2], ("ab", "c"))
    assert pool.find(hashes_of(pool, [1, 2], ("ab", "c")))
    for other in (("a", "bc"), ("abc", ""), ("ab", ""), ("", "c")):
        assert pool.find(hashes_of(pool, [1, 2], other)) == []


def test_digests_differ_between_processes() -> None:
    """Guards against prompts constructed to collide: the key is random and stays here."""
    assert hashes_of(BlockPool(3, 2), [1, 2]) != hashes_of(BlockPool(3, 2), [1, 2])
    assert len(hashes_of(BlockPool(3, 2), [1, 2])[0]) == 16


def test_hashes_are_extended_not_computed_again() -> None:
    """Guards the cost of a decoding row: one digest per block, and the same as in one go."""
    pool = BlockPool(3, 2)
    hashes = hashes_of(pool, [1, 2, 3])
    assert len(hashes) == 1
    first = hashes[0]
    pool.extend_hashes(hashes, [1, 2, 3, 4, 5], LABELS)
    assert hashes[0] is first
    assert hashes == hashes_of(pool, [1, 2, 3, 4])


def test_a_block_whose_content_is_known_stays_anonymous() -> None:
    """Guards two rows that computed the same prefix side by side: only one copy is kept."""
    pool = BlockPool(5, 2)
    first, second = publish(pool, [1, 2]), publish(pool, [1, 2])
    assert pool.find(hashes_of(pool, [1, 2])) == first
    assert not pool.is_published(second[0])
    pool.release(second)
    pool.release(first)
    pool.check_integrity([])
    assert pool.find(hashes_of(pool, [1, 2])) == first


def test_without_caching_nothing_is_found() -> None:
    """Guards `--no-enable-prefix-caching`."""
    pool = BlockPool(5, 2, caching=False)
    pool.release(publish(pool, [1, 2]))
    assert hashes_of(pool, [1, 2]) == []
    pool.check_integrity([])


def test_token_ids_of_any_width_are_hashed() -> None:
    """Guards the engine against a vocabulary wider than an array type."""
    pool = BlockPool(5, 2)
    assert hashes_of(pool, [2**31, 2**40]) != hashes_of(pool, [0, 2**40])


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._refs.__setitem__(1, 3),
        lambda pool: pool._refs.__setitem__(0, 1),
        lambda pool: pool._digest_of.popitem(),
        lambda pool: pool._block_of.popitem(),
        lambda pool: pool.share([1]),
    ],
)
def test_integrity_sees_damage(damage: Callable[[BlockPool], object]) -> None:
    """Guards the guard: a leak, a block in two places, a lost reference, a torn index."""
    pool = BlockPool(8, 2)
    tables = [publish(pool, [1, 2, 3])]
    pool.release(publish(pool, [5, 6]))
    pool.check_integrity(tables)
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


def test_any_order_of_use_keeps_the_books() -> None:
    """Guards every transition between the three states against every other."""
    random_source = random.Random(1)
    pool = BlockPool(12, 2)
    tables: list[list[int]] = []
    for _ in range(2000):
        tokens = [random_source.randrange(2) for _ in range(random_source.randrange(2, 8))]
        hits = pool.find(hashes_of(pool, tokens))
        needed = pool.blocks_for(len(tokens)) - len(hits)
        if needed <= pool.num_available - pool.num_unowned(hits):
            pool.share(hits)
            table = hits + pool.allocate(needed)
            hashes = hashes_of(pool, tokens)
            pool.publish(table[: len(hashes)], hashes)
            tables.append(table)
        else:
            pool.release(tables.pop(random_source.randrange(len(tables))))
        pool.check_integrity(tables)
