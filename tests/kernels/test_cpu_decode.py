"""Which rows share a gather, and what a gather holds. That attention over it is right: `test_attention.py`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ropeway.kernels.cpu_decode import GATHERED_TOKENS, DecodeRows, Scratch, calls_of


@given(st.lists(st.integers(0, 5000), max_size=80))
def test_calls(contexts: list[int]) -> None:
    """Guards speed: rows padded to twice their length, or more gathered at once than the cache holds; and that no row
    is forgotten or attended twice."""
    calls = calls_of(contexts)
    assert sorted(row for call in calls for row in call) == list(range(len(contexts)))
    for call in calls:
        shortest, longest = min(contexts[row] for row in call), max(contexts[row] for row in call)
        assert longest <= 2 * max(shortest, 64)
        assert len(call) == 1 or longest * len(call) <= GATHERED_TOKENS


def rows(contexts: list[int], tables: list[list[int]]) -> DecodeRows:
    return DecodeRows(
        torch.arange(len(contexts)), torch.tensor(contexts), torch.tensor(tables), block_size=4, longest=max(contexts)
    )


def test_a_gather_holds_the_rows_and_nothing_else() -> None:
    """Guards isolation: the rest of a row's last block, and what stands for a freed one, is somebody's left-over."""
    pool = torch.arange(24.0).view(6, 4, 1, 1)
    k, _, mask = rows([6, 3], [[5, 2], [3, 0]]).gather(pool, pool, None, Scratch(), pool.dtype)
    assert k.flatten(1).tolist() == [[20, 21, 22, 23, 8, 9, 0, 0], [12, 13, 14, 0, 0, 0, 0, 0]]
    assert mask is not None
    assert mask.flatten(1).sum(1).tolist() == [6, 3]


def test_a_window_gathers_its_own_blocks() -> None:
    """Guards speed and freed blocks: of a long row only the last blocks are read, and block 0 never counts."""
    pool = torch.arange(24.0).view(6, 4, 1, 1)
    k, _, mask = rows([14], [[0, 0, 4, 1]]).gather(pool, pool, 5, Scratch(), pool.dtype)
    assert mask is not None
    assert k.flatten()[mask.flatten()].tolist() == [17, 18, 19, 4, 5]


def test_full_blocks_need_no_mask() -> None:
    """Guards speed: a mask is only there where something is hidden."""
    pool = torch.randn(6, 4, 2, 3)
    k, v, mask = rows([8, 8], [[5, 2], [3, 1]]).gather(pool, pool, None, Scratch(), pool.dtype)
    assert mask is None
    assert torch.equal(k[1], torch.cat([pool[3], pool[1]]).transpose(0, 1)) and torch.equal(k, v)
