"""The list of parts: every key of every short row once, in few parts of one length."""

import random

import pytest
import torch

pytest.importorskip("triton")

from ropeway.kernels.triton_attention_plan import Plan, make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plan(contexts: list[int], queries: list[int], parts: int, window: int | None = None) -> Plan:
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int().to(DEVICE)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    return make_plan(starts, lengths, parts=parts, kv_heads=2, short_query=4, block_n=16, window=window)


@pytest.mark.parametrize("parts", [1, 7, 64])
def test_every_key_is_in_one_part(parts: int) -> None:
    """Guards both ends: a key in no part is forgotten, one in two counts twice; pads of the list must say so."""
    pick = random.Random(parts)
    contexts = [pick.choice([0, 1, 16, 17, 300, 5000]) for _ in range(20)]
    queries = [pick.choice([1, 1, 4, 5]) if context else 1 for context in contexts]
    made = plan(contexts, queries, parts)
    rows, splits, firsts = made.part_row.tolist(), made.part_split.tolist(), made.first_part.tolist()
    length = int(made.split_keys)
    assert length % 16 == 0
    listed = list(zip(rows, splits, strict=True))[: firsts[-1]]
    assert set(rows[firsts[-1] :]) <= {-1}
    expected = [
        (row, split)
        for row, (context, query) in enumerate(zip(contexts, queries, strict=True))
        if query <= 4
        for split in range(max(1, -(-context // length)))
    ]
    assert listed == expected
    assert all(rows[first] == row for row, first in enumerate(firsts[:-1]) if queries[row] <= 4)
    assert not made.arrived.any() and len(made.arrived) == 40


def test_a_long_row_among_many_short_ones_is_cut() -> None:
    """Guards mixed batches: one program would walk through a long context alone while all others have ended."""
    made = plan([100] * 30 + [30_000], [1] * 31, 8)
    counts = made.first_part.diff().tolist()
    assert counts[:30] == [1] * 30 and counts[30] > 10


def test_rows_of_one_length_stay_whole_when_they_are_enough() -> None:
    """Guards large batches from merges that nobody needs."""
    assert plan([500] * 30, [1] * 30, 16).first_part.tolist() == list(range(31))


def test_a_window_hides_the_keys_before_it() -> None:
    """Guards sliding windows: only what is seen is cut, from the tile of the first key that is seen."""
    made = plan([1000, 1000, 20], [1, 1, 1], 20, window=40)
    assert int(made.split_keys) == 16
    assert made.first_part.tolist() == [0, 3, 6, 8]  # keys 960..999 are tiles 960, 976, 992
