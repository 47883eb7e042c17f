"""The noise: its bits, its distribution, its independence."""

import math

import pytest
import torch
from scipy import stats

from ropeway.kernels.noise import gumbel, random_bits

INT64 = torch.iinfo(torch.int64)


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser on Python's integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def reference_bits(seed: int, position: int, token_id: int) -> int:
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    key_0 = fmix32(fmix32(fmix32(low ^ 0xCC9E2D51) ^ high) ^ position)
    key_1 = fmix32(fmix32(fmix32(high ^ 0x1B873593) ^ low) ^ position)
    return fmix32(fmix32(token_id ^ key_0) ^ key_1)


def uniforms(seeds: list[int], positions: list[int], num_tokens: int) -> torch.Tensor:
    """[L, num_tokens] float64 in (0, 1)."""
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions), torch.arange(num_tokens)).to(torch.int64)
    return ((bits & 0xFFFFFFFF).double() + 0.5) / 2**32


def test_bits_are_those_of_the_published_mixer() -> None:
    """Guards the contract with other devices: wrapping products, shifts without the sign, all 64 bits of the seed."""
    seeds = [0, 1, -1, 2**31, -(2**31), 2**32, INT64.min, INT64.max, 123456789012345]
    positions = [0, 1, 7, 4095, 2**31 - 1, 2**31, 2**32 - 1, 131072, 5]
    ids = [0, 1, 2, 31999, 262143, 2**31 - 1]
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(ids))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert [x & 0xFFFFFFFF for x in bits[row].tolist()] == [reference_bits(seed, position, i) for i in ids]


def test_a_row_is_the_same_alone_among_others_and_for_chosen_ids() -> None:
    """Guards independence from neighbours, to the bit, also where vectorised loops have a remainder."""
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(INT64.min, INT64.max, (13,), generator=generator)
    positions = torch.randint(0, 100_000, (13,), generator=generator)
    together = gumbel(seeds, positions, torch.arange(1003))
    for row in range(13):
        alone = gumbel(seeds[row : row + 1], positions[row : row + 1], torch.arange(1003))
        assert torch.equal(alone[0], together[row])
    chosen = torch.randint(0, 1003, (13, 37), generator=generator)
    assert torch.equal(gumbel(seeds, positions, chosen), together.gather(1, chosen))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3])
def test_uniform_over_tokens_positions_and_seeds(seed: int) -> None:
    """Guards against a mixer that is weak along one of its inputs."""
    along_tokens = uniforms([seed], [17], 200_000)[0]
    along_positions = uniforms([seed] * 20_000, list(range(20_000)), 1)[:, 0]
    along_seeds = uniforms([seed + i for i in range(20_000)], [3] * 20_000, 1)[:, 0]
    for sample in (along_tokens, along_positions, along_seeds):
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3
        for byte in (2**8, 2**16, 2**24, 2**32):  # every byte of the word, not only the highest
            counts = torch.bincount((sample * byte).to(torch.int64) & 0xFF, minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbours_are_uncorrelated() -> None:
    """Guards against runs: seeds and positions come one after the other, and choices take seed, seed + 1, ..."""
    base = uniforms([5] * 64, list(range(64)), 4096)
    other_seed = uniforms([6] * 64, list(range(64)), 4096)
    high_word = uniforms([5 + 2**32] * 64, list(range(64)), 4096)
    pairs = {
        "token": (base[:, :-1], base[:, 1:]),
        "position": (base[:-1], base[1:]),
        "seed": (base, other_seed),
        "high word of the seed": (base, high_word),
        "position for token": (base[:, :64], base[:, :64].T),
        "seed for position": (base[1:], other_seed[:-1]),
    }
    for name, (a, b) in pairs.items():
        if name == "position for token":
            off = ~torch.eye(64, dtype=torch.bool)
            a, b = a[off], b[off]
        a, b = a.flatten(), b.flatten()
        correlation = torch.corrcoef(torch.stack((a, b)))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(len(a)), name
        grid = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256)
        assert stats.chisquare(grid.numpy()).pvalue > 1e-4, name


def test_every_bit_of_the_input_turns_half_of_the_output() -> None:
    """Guards avalanche: a flip of one bit of seed, position or id changes each output bit with probability 1/2."""
    generator = torch.Generator().manual_seed(3)
    n = 4096
    seeds = torch.randint(INT64.min, INT64.max, (n,), generator=generator)
    positions = torch.randint(0, 2**31, (n,), generator=generator)
    ids = torch.randint(0, 2**18, (n, 1), generator=generator)
    base = random_bits(seeds, positions, ids)
    flips = [(seeds ^ (1 << b), positions, ids) for b in range(63)]
    flips += [(seeds, positions ^ (1 << b), ids) for b in range(31)]
    flips += [(seeds, positions, ids ^ (1 << b)) for b in range(18)]
    for flipped in flips:
        changed = (random_bits(*flipped) ^ base).to(torch.int64)
        for bit in range(32):
            share = ((changed >> bit) & 1).double().mean().item()
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_gumbel_has_the_right_distribution_and_no_infinity() -> None:
    """Guards the tails: the winner of a softmax is decided in the upper one."""
    noise = gumbel(torch.arange(64), torch.arange(64), torch.arange(20_000)).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise[:200_000].double().numpy(), "gumbel_r").pvalue > 1e-3
    for above in (5.0, 8.0, 11.0):
        expected = len(noise) * -math.expm1(-math.exp(-above))
        assert abs((noise > above).sum().item() - expected) < 5 * math.sqrt(expected)


def test_gumbel_of_extreme_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards fp32 rounding at both ends and in the middle: compared with float64 on the same bits."""
    words = [0, 1, 2, 2**24, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**24, 2**32 - 2, 2**32 - 1]
    bits = torch.tensor([(w ^ 2**31) - 2**31 for w in words], dtype=torch.int32).unsqueeze(0)
    monkeypatch.setattr("ropeway.kernels.noise.random_bits", lambda *_: bits.clone())
    noise = gumbel(torch.zeros(1), torch.zeros(1), torch.zeros(1))[0].tolist()
    exact = [-math.log(-math.log((w + 0.5) / 2**32)) for w in words]
    assert noise == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert noise == sorted(noise)
    assert noise[-1] > noise[-2] > 20  # steps of 2^-32 are still apart at the top
