"""The list of tiles on which the Hopper kernels work; tests/gpu has the kernels, which no interpreter runs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from ropeway.kernels import hopper_attention
from ropeway.kernels.hopper_attention import fits, known, make_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(50, 1), (900, 69), (30, 30), (7, 1), (1299, 299), (60, 5), (64, 64), (4, 4), *[(90, 1)] * 150, (700, 33)]
"""(context after the step, tokens of the step): more than the kernel looks through at once."""


def tiles_of(rows: list[tuple[int, int]], window: int | None, bound: int) -> list[list[int]]:
    starts = torch.tensor([0] + [tokens for _, tokens in rows], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    context = torch.tensor([context for context, _ in rows], dtype=torch.int32, device=DEVICE)
    made = make_tiles(starts, context, tokens=bound, short_query=4, block_q=32, block_n=128, window=window)
    lines: list[list[int]] = made.entries.tolist()
    assert len(lines) == bound // 32 + len(rows)
    return lines


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("bound", [720, 2048], ids=["all tokens", "a bucket's"])
def test_every_token_of_a_long_row_once(window: int | None, bound: int) -> None:
    """Guards the numbering of tiles: a tile left out is a token that nobody writes, one twice is a race."""
    wanted, first = [], 0
    for row, (context, tokens) in enumerate(ROWS):
        if tokens > 4:
            wanted += [(row, first + i, context - tokens + i) for i in range(tokens)]
        first += tokens
    tiles = [line for line in tiles_of(ROWS, window, bound) if line[2] > 0]
    found = [(row, first + i, position + i) for row, first, tokens, position in tiles for i in range(tokens)]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("window", [None, 200])
def test_longest_first(window: int | None) -> None:
    """Guards the end of a launch: a long tile begun last is waited for by all; and programs stop at the first empty
    line."""
    counts = []
    for _, _, tokens, position in tiles_of(ROWS, window, 2048):
        lowest = 0 if window is None else max(0, position - window + 1) // 128
        counts.append((position + tokens - 1) // 128 - lowest + 1 if tokens else 0)
    assert counts == sorted(counts, reverse=True) and 0 in counts and counts[0] > 2


def test_rows_of_padding_have_tiles() -> None:
    """Guards buckets: a long row without context, which is padding, gets its zeros from somebody."""
    tiles = tiles_of([(40, 1), (0, 70)], None, 71)
    assert [line[1:3] for line in tiles[:3]] == [[1, 32], [33, 32], [65, 6]]


def test_elsewhere_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards other devices, dtypes, sizes and short steps, which the kernels do not take."""
    monkeypatch.setattr(hopper_attention, "attend_tiles", object())
    monkeypatch.setattr(hopper_attention, "_is_hopper", lambda device: True)
    monkeypatch.setattr(hopper_attention, "triton", SimpleNamespace(__version__="3.6.0"))

    def taken(
        tokens: int = 512,
        head: int = 128,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        mixed: bool = False,
    ) -> bool:
        q = torch.empty(tokens, 32, head, dtype=dtype)
        pool = torch.empty(2, block_size, 8, head, dtype=dtype)
        return fits(q, pool, pool, 1, mixed=mixed)

    assert taken() and taken(head=64) and taken(block_size=32) and taken(dtype=torch.float16)
    assert taken(tokens=1025, mixed=True)
    refused = [
        {"tokens": 200},
        {"mixed": True},
        {"head": 96},
        {"block_size": 4},
        {"block_size": 24},
        {"dtype": torch.float32},
    ]
    assert not any(taken(**options) for options in refused)  # type: ignore[arg-type]
    with monkeypatch.context() as other:
        other.setattr(hopper_attention, "triton", SimpleNamespace(__version__="3.10.0"))
        assert not taken()
    monkeypatch.setattr(hopper_attention, "_is_hopper", lambda device: False)
    assert not taken()


def test_versions_of_triton() -> None:
    """Guards newer ones, where the kernels might be imported and then not compile, and numbers compared as text."""
    assert [known(version) for version in ("3.5.1", "3.6rc1", "3.9.1+git", "3.10.0", "4.0")] == [
        *(False, True, True, False, False)
    ]
