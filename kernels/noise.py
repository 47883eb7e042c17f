"""Counter-based Gumbel noise: a function of a row's seed, the position and the token id, and of nothing else.

No state and no order of calls: a row gets the same noise whatever its neighbours, after preemption, after a crash.
Adding it to the log-probabilities and taking the largest draws from the softmax (the Gumbel-max trick).

The mixer is the 32-bit finaliser of MurmurHash3 (`fmix32`, Austin Appleby, public domain), applied as the permutation
of a two-round Even-Mansour construction with 64 bits of key per (seed, position): fmix32(fmix32(id ^ k0) ^ k1). All
of it is 32-bit wrapping integer arithmetic, so `random_bits` is the same on every device, and a Triton kernel
repeats it with uint32; the two logarithms after it are the device's own (equal to about 1e-6).
"""

import torch


def _int32(word: int) -> int:
    """The signed number with the same 32 bits."""
    return (word ^ 0x80000000) - 0x80000000


# The constants of fmix32, and two unrelated ones (of MurmurHash3_x86_32) that start the two keys.
_MULTIPLY_1, _MULTIPLY_2 = _int32(0x85EBCA6B), _int32(0xC2B2AE35)
_START_0, _START_1 = _int32(0xCC9E2D51), _int32(0x1B873593)


def _fmix32_(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser, in place on int32; `scratch` has the shape of `x`."""
    for shift, factor in ((16, _MULTIPLY_1), (13, _MULTIPLY_2), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch &= (1 << (32 - shift)) - 1  # the shift copies the sign bit into the places it frees
        x ^= scratch
        if factor != 1:
            x *= factor
    return x


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64, as int32."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[L] int64, [L] int64 -> [2, L] int32. For one seed, each key takes a different value at every position."""
    low, high = _low_word(seeds), _low_word(seeds >> 32)
    keys = torch.stack((low ^ _START_0, high ^ _START_1))
    scratch = torch.empty_like(keys)
    _fmix32_(keys, scratch)
    keys ^= torch.stack((high, low))
    _fmix32_(keys, scratch)
    keys ^= _low_word(positions)
    return _fmix32_(keys, scratch)


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """32 random bits for each row and token.

    seeds [L] int64, positions [L] int64 (below 2^32), token_ids [C] (the same for all rows) or [L, C], integers below
    2^31. Returns [L, C] int32; every bit pattern is equally likely.
    """
    keys = _keys(seeds, positions)
    x = token_ids.to(torch.int32) ^ keys[0].unsqueeze(1)
    scratch = torch.empty_like(x)
    _fmix32_(x, scratch)
    x ^= keys[1].unsqueeze(1)
    return _fmix32_(x, scratch)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -log(-log u), arguments as for `random_bits`. Returns [L, C] fp32, always finite.

    u = (bits + 1/2) / 2^32 is never rounded to fp32: near 1 that would leave 2^-24 between neighbours, and near 0 and
    1 infinities. Its distance to the nearer end is kept instead, which fp32 holds to 2^-33 on both sides:

        bits as int32    -2^31 ........ -1 | 0 ........... 2^31 - 1
        distance          0.5 ...... 2^-33 | 2^-33 ............ 0.5
        stands for u      0.5 .. 1 - 2^-33 | 2^-33 ............ 0.5
    """
    bits = random_bits(seeds, positions, token_ids)
    upper = bits >> 31  # all ones above 1/2, zero below
    bits ^= upper  # x for x >= 0, -1 - x below: the distance in steps
    distance = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    # Chosen bit by bit, since `torch.where` takes longer than both logarithms when the condition is random.
    below, above = distance.log().view(torch.int32), distance.neg_().log1p_().view(torch.int32)
    log_u = ((above.bitwise_xor_(below)).bitwise_and_(upper)).bitwise_xor_(below).view(torch.float32)
    return log_u.neg_().log_().neg_()
