"""What `triton_sampler_kernels.py` needs to draw: noise, scaled scores, and what top-k, top-p and min-p leave of a row.

Scores of a drawn row are relative to its largest and divided by its temperature, so none is above 0: the bits of their
magnitude, taken as an integer, order them, 0 being the best.

A group is GROUP consecutive tokens. What top-k and top-p keep is the upper end of a row, and a token can only be in it
if its group's largest is: so a filtered row is not looked through, only those of its groups are.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from ropeway.kernels.triton_jit import jit, tl


@jit()
def _fmix32(x):
    """MurmurHash3's finaliser on uint32, as in `noise.py`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit()
def noise_keys(seed, position):
    """The two keys of one (seed, position), as in `noise.py`."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    place = position.to(tl.uint32)
    key_0 = _fmix32(_fmix32(_fmix32(low ^ 0xCC9E2D51) ^ high) ^ place)
    key_1 = _fmix32(_fmix32(_fmix32(high ^ 0x1B873593) ^ low) ^ place)
    return key_0, key_1


@jit()
def _log(x, FAST: tl.constexpr):
    """Natural logarithm of a positive, normal number; FAST: of relative error 2^-22, or absolute near 1."""
    if FAST:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        result = 0.6931471805599453 * tl.inline_asm_elementwise(asm, "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        result = tl.log(x)
    return result


@jit()
def gumbel(key_0, key_1, token, FAST: tl.constexpr):
    """Standard Gumbel noise of `noise.py`: the same bits, the logarithms equal to about 2e-6."""
    bits = _fmix32(_fmix32(token.to(tl.uint32) ^ key_0) ^ key_1).to(tl.int32, bitcast=True)
    distance = ((bits ^ (bits >> 31)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # -log(1 - d): a series (error d^8 / 9) where 1 - d has lost too much of a small d
    series = 1.0 / 7 + distance * (1.0 / 8)
    series = 1.0 / 3 + distance * (1.0 / 4 + distance * (1.0 / 5 + distance * (1.0 / 6 + distance * series)))
    series = distance + distance * distance * (0.5 + distance * series)
    upper = tl.where(distance < 0.125, series, -_log(1.0 - distance, FAST))
    return -_log(tl.where(bits >= 0, -_log(distance, FAST), upper), FAST)


@jit()
def best_of(values, ids):
    """The largest value and the lowest id that has it; NaN counts as the least."""
    values = tl.where(values == values, values, float("-inf"))
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, 2147483647), 0)


@jit()
def scaled(score, peak, heat):
    """Relative to the largest, by the temperature, rounded as torch does."""
    return tl.div_rn(score - peak, tl.zeros_like(score) + heat)


@jit()
def _key(score):
    """The bits of a score's magnitude: they order scores that are not above 0, the best first."""
    return tl.abs(score).to(tl.int32, bitcast=True)


@jit()
def _list_groups(listed, keys, last_key, GROUPS_2: tl.constexpr):
    """Writes the numbers of the groups whose best key is not beyond `last_key`; how many there are."""
    taken = (keys <= last_key).to(tl.int32)
    place = tl.cumsum(taken, 0) - taken
    tl.store(listed + place, tl.arange(0, GROUPS_2), mask=taken > 0)
    tl.debug_barrier()
    return tl.sum(taken, 0)


@jit()
def _kth_key(keys, k):
    """The k-th smallest of some keys, bit by bit from the highest."""
    lowest = 0
    for bit in range(31):
        candidate = lowest | (1 << (30 - bit))
        lowest = tl.where(tl.sum((keys < candidate).to(tl.int32), 0) < k, candidate, lowest)
    return lowest


@jit()
def _look(scores, listed, groups, start, peak, heat, vocabulary, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [start, start + BLOCK) of the listed groups: which there are, their ids and scaled scores."""
    index = start + tl.arange(0, BLOCK)
    group = tl.load(listed + index // GROUP, mask=index < groups * GROUP, other=0)
    token = group * GROUP + index % GROUP
    inside = (index < groups * GROUP) & (token < vocabulary)
    score = tl.load(scores + token, mask=inside, other=float("-inf")).to(tl.float32)
    return inside, token, scaled(score, peak, heat)


@jit()
def _top_k_key(scores, listed, groups, peak, heat, vocabulary, k, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A key such that the keys up to it are the k best of the row, and whatever equals the k-th.

    Radix selection, 6 bits at a time from the highest; it ends as soon as a digit's last key leaves exactly k.
    """
    lowest = 0  # the k-th best key is in [lowest, lowest + 2 ** parent)
    parent = 31
    before = 0  # keys below `lowest`
    found = -1
    while found < 0:
        shift = tl.maximum(parent - 6, 0)
        counts = tl.zeros([64], tl.int32)
        for start in range(0, groups * GROUP, BLOCK):
            inside, _, score = _look(scores, listed, groups, start, peak, heat, vocabulary, GROUP, BLOCK)
            key = _key(score)
            inside = inside & ((key >> parent) == (lowest >> parent))
            counts += tl.histogram((key >> shift) & 63, 64, mask=inside)
        below = before + tl.cumsum(counts, 0) - counts
        digit = tl.sum((below < k).to(tl.int32), 0) - 1
        at_digit = tl.arange(0, 64) == digit
        before = tl.sum(tl.where(at_digit, below, 0), 0)
        reached = before + tl.sum(tl.where(at_digit, counts, 0), 0)
        # the last digit has fewer bits: above them it repeats those of `lowest`
        lowest = (lowest >> parent << parent) | ((digit << shift) & ((1 << parent) - 1))
        if (reached == k) | (shift == 0):
            found = lowest + (1 << shift) - 1
        parent = shift
    return found


@jit()
def _weigh_better(
    scores, listed, groups, peak, heat, vocabulary, last_key, rival_key, rival_id,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens weigh that are better than a rival: higher score, or the same and a higher id. Only keys up to
    `last_key` have weight."""
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, groups * GROUP, BLOCK):
        inside, token, score = _look(scores, listed, groups, start, peak, heat, vocabulary, GROUP, BLOCK)
        key = _key(score)
        better = inside & (key <= last_key) & ((key < rival_key) | ((key == rival_key) & (token > rival_id)))
        weight += tl.where(better, tl.exp(score), 0.0)
    return tl.sum(weight, 0)


@jit()
def _draw_better(
    scores, listed, groups, peak, heat, vocabulary, last_key, rival_key, rival_id, smallest, key_0, key_1,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The id of the largest score + noise among the tokens that `_weigh_better` weighs, if they weigh `smallest`."""
    winner = tl.full([BLOCK], float("-inf"), tl.float32)
    winner_id = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, groups * GROUP, BLOCK):
        inside, token, score = _look(scores, listed, groups, start, peak, heat, vocabulary, GROUP, BLOCK)
        key = _key(score)
        better = inside & (key <= last_key) & ((key < rival_key) | ((key == rival_key) & (token > rival_id)))
        with_noise = score + gumbel(key_0, key_1, token, FAST)
        wins = better & (tl.exp(score) >= smallest) & (with_noise > winner)
        winner = tl.where(wins, with_noise, winner)
        winner_id = tl.where(wins, token, winner_id)
    _, best_id = best_of(winner, winner_id)
    return best_id


@jit()
def draw_filtered(
    scores, group_peaks, listed, total, chosen, peak, heat, vocabulary, top_k, top_p, min_p, key_0, key_1,
    GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The largest score + noise among what top-k, top-p and min-p leave.

    What they leave is the upper end of the row, so the first winner among all that top-k and min-p leave either is
    within top-p, and then the answer; or it is not, and neither is anything below it: the winner among the better
    ones is the next to look at. A winner is a draw from the softmax, so the first is mostly right. Without top-k it
    is `chosen`, and `total` is what the row weighs.
    """
    group = tl.arange(0, GROUPS_2)
    largest = tl.load(group_peaks + group, mask=group < GROUPS, other=float("-inf"))
    keys = tl.where(group < GROUPS, _key(scaled(largest, peak, heat)), 0x7FFFFFFF)
    last_key = 0x7F800000  # of -inf
    if top_k > 0:
        groups = _list_groups(listed, keys, tl.minimum(_kth_key(keys, top_k), last_key), GROUPS_2)
        last_key = _top_k_key(scores, listed, groups, peak, heat, vocabulary, top_k, GROUP, BLOCK)
        total = _weigh_better(
            scores, listed, groups, peak, heat, vocabulary, last_key, 0x7FFFFFFF, -1, GROUP, BLOCK
        )  # fmt: skip
        chosen = _draw_better(
            scores, listed, groups, peak, heat, vocabulary, last_key, 0x7FFFFFFF, -1, min_p, key_0, key_1,
            GROUP, BLOCK, FAST,
        )  # fmt: skip
    else:
        chosen_key = _key(scaled(tl.load(scores + chosen).to(tl.float32), peak, heat))
        groups = _list_groups(listed, keys, chosen_key, GROUPS_2)
    limit = tl.maximum(top_p * total, 1e-30)
    undecided = top_p < 1
    while undecided:
        chosen_key = _key(scaled(tl.load(scores + chosen).to(tl.float32), peak, heat))
        weight = _weigh_better(
            scores, listed, groups, peak, heat, vocabulary, last_key, chosen_key, chosen, GROUP, BLOCK
        )  # fmt: skip
        undecided = weight >= limit
        if undecided:
            chosen = _draw_better(
                scores, listed, groups, peak, heat, vocabulary, last_key, chosen_key, chosen, min_p, key_0, key_1,
                GROUP, BLOCK, FAST,
            )  # fmt: skip
    return chosen
