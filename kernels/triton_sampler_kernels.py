"""The device code of `triton_sampler.py`, which says in what order it runs and what the state's tensors hold.

A chunk is BLOCK consecutive tokens of the vocabulary. Scores of a drawn row are relative to its largest and divided by
its temperature, so none is above 0: the bits of their magnitude, taken as an integer, order them, 0 being the best.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from ropeway.kernels.triton_jit import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit()
def _fmix32(x):
    """MurmurHash3's finaliser on uint32, as in `noise.py`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit()
def _noise_keys(seed, position):
    """The two keys of one (seed, position), as in `noise.py`."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    place = position.to(tl.uint32)
    key_0 = _fmix32(_fmix32(_fmix32(low ^ 0xCC9E2D51) ^ high) ^ place)
    key_1 = _fmix32(_fmix32(_fmix32(high ^ 0x1B873593) ^ low) ^ place)
    return key_0, key_1


@jit()
def _gumbel(key_0, key_1, token):
    """Standard Gumbel noise of `noise.py`: the same bits, the logarithms equal to about 1e-6."""
    bits = _fmix32(_fmix32(token.to(tl.uint32) ^ key_0) ^ key_1).to(tl.int32, bitcast=True)
    lower = bits >= 0
    distance = ((bits ^ (bits >> 31)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # log(1 - d) = d * log(r) / (1 - r), where r is 1 - d rounded (W. Kahan); -d where r is 1.
    rounded = 1.0 - distance
    exact = rounded == 1.0
    upper = tl.where(exact, -distance, distance * tl.log(rounded) / tl.where(exact, 1.0, 1.0 - rounded))
    return -tl.log(-tl.where(lower, tl.log(distance), upper))


@jit()
def _peak_of(values):
    """The largest, or NaN if one of them is."""
    lost = values != values
    return tl.where(tl.max(lost.to(tl.int32), 0) > 0, float("nan"), tl.max(tl.where(lost, float("-inf"), values), 0))


@jit()
def _best(values, ids):
    """The largest value and the lowest id that has it; NaN counts as the least."""
    values = tl.where(values == values, values, float("-inf"))
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, 2147483647), 0)


@jit()
def process(
    logits,
    scores,
    raw_peaks,
    slots,
    flags,
    bias,
    history,
    repetition_penalty,
    frequency_penalty,
    presence_penalty,
    vocabulary,
    BIAS: tl.constexpr,
    PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bias and penalties of one row and chunk; the largest of the model's own logits is kept beside."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    slot = tl.load(slots + row)
    flag = tl.load(flags + row)
    score = tl.load(logits + row * vocabulary + token, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(raw_peaks + row * tl.num_programs(1) + tl.program_id(1), _peak_of(score))
    if BIAS and flag % 2 == 1:
        score += tl.load(bias + slot * vocabulary + token, mask=inside, other=0.0)
    if PENALTIES and flag >= 2:
        seen = tl.load(history + slot * vocabulary + token, mask=inside, other=0)
        repetition = tl.load(repetition_penalty + slot)
        repeated = tl.where(score < 0, score * repetition, tl.div_rn(score, tl.zeros_like(score) + repetition))
        score = tl.where(seen > 0, repeated, score)
        times = seen >> 1
        score -= times.to(tl.float32) * tl.load(frequency_penalty + slot)
        score -= (times > 0).to(tl.float32) * tl.load(presence_penalty + slot)
    tl.store(scores + row * vocabulary + token, score, mask=inside)


@jit()
def find_peaks(scores, peaks, peak_ids, vocabulary, BLOCK: tl.constexpr):
    """The largest score of one row and chunk, and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * vocabulary + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + at, _peak_of(score))
    _, best_id = _best(score, token)
    tl.store(peak_ids + at, best_id)


@jit()
def _row_peak(peaks, row, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr):
    """A row's largest score from its chunks'; NaN if it has one."""
    chunk = tl.arange(0, CHUNKS_2)
    return _peak_of(tl.load(peaks + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf")))


@jit()
def _is_finite(x):
    return (x == x) & (tl.abs(x) != float("inf"))


@jit()
def _filters(slot, top_k, top_p, min_p, vocabulary):
    """A row's k (0 = off), p, least share, and whether any of them is on."""
    k = tl.load(top_k + slot).to(tl.int32)
    k = tl.where(k < vocabulary, k, 0)
    p = tl.load(top_p + slot)
    least = tl.load(min_p + slot)
    return k, p, least, (k > 0) | (p < 1) | (least > 0)


@jit()
def draw(
    scores,
    peaks,
    drawn,
    drawn_ids,
    scaled,
    noisy,
    slots,
    positions,
    temperature,
    seed,
    top_k,
    top_p,
    min_p,
    vocabulary,
    smallest_temperature,
    FILTERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest score + noise of one row and chunk; of filtered rows all of them, for `choose` to look through.

    Greedy rows are left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot)
    peak = _row_peak(peaks, row, CHUNKS, CHUNKS_2)
    if heat < smallest_temperature:
        return
    if not _is_finite(peak):
        return
    key_0, key_1 = _noise_keys(tl.load(seed + slot), tl.load(positions + row))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    score = tl.load(scores + row * vocabulary + token, mask=inside, other=float("-inf")).to(tl.float32)
    score = tl.div_rn(score - peak, tl.zeros_like(score) + heat)
    with_noise = score + _gumbel(key_0, key_1, token)
    best, best_id = _best(with_noise, token)
    tl.store(drawn + row * CHUNKS + tl.program_id(1), best)
    tl.store(drawn_ids + row * CHUNKS + tl.program_id(1), best_id)
    if FILTERED:
        _, _, _, filtered = _filters(slot, top_k, top_p, min_p, vocabulary)
        if filtered:
            tl.store(scaled + row * vocabulary + token, score, mask=inside)
            tl.store(noisy + row * vocabulary + token, with_noise, mask=inside)


@jit()
def _key(score):
    """The bits of a score's magnitude: they order scores that are not above 0, the best first."""
    return tl.abs(score).to(tl.int32, bitcast=True)


@jit()
def _top_k_key(scaled, vocabulary, k, BLOCK: tl.constexpr):
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
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = _key(tl.load(scaled + token, mask=token < vocabulary, other=float("-inf")))
            inside = (token < vocabulary) & ((key >> parent) == (lowest >> parent))
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
def _draw_better(scaled, noisy, vocabulary, last_key, smallest, rival_key, rival_id, BLOCK: tl.constexpr):
    """Among the tokens that are better than a rival: their weight, and the id and key of the largest score + noise.

    Better = higher score, or the same and a higher id. Only keys up to `last_key` have weight, and only scores that
    weigh at least `smallest` can win.
    """
    weight = tl.zeros([BLOCK], tl.float32)
    winner = tl.full([BLOCK], float("-inf"), tl.float32)
    winner_id = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scaled + token, mask=token < vocabulary, other=float("-inf"))
        with_noise = tl.load(noisy + token, mask=token < vocabulary, other=float("-inf"))
        key = _key(score)
        better = (token < vocabulary) & (key <= last_key)
        better = better & ((key < rival_key) | ((key == rival_key) & (token > rival_id)))
        share = tl.exp(score)
        weight += tl.where(better, share, 0.0)
        wins = better & (share >= smallest) & (with_noise > winner)
        winner = tl.where(wins, with_noise, winner)
        winner_id = tl.where(wins, token, winner_id)
    _, best_id = _best(winner, winner_id)
    return tl.sum(weight, 0), best_id, _key(tl.load(scaled + best_id))


@jit()
def _draw_filtered(scaled, noisy, vocabulary, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The largest score + noise among what top-k, top-p and min-p leave.

    What they leave is the upper end of the row, so the first winner among all that top-k and min-p leave either is
    within top-p, and then the answer; or it is not, and neither is anything below it: the winner among the better
    ones is the next to look at. A winner is a draw from the softmax, so the first is mostly right.
    """
    last_key = 0x7F800000  # of -inf
    if top_k > 0:
        last_key = _top_k_key(scaled, vocabulary, top_k, BLOCK)
    total, chosen, chosen_key = _draw_better(scaled, noisy, vocabulary, last_key, min_p, 0x7FFFFFFF, -1, BLOCK)
    limit = tl.maximum(top_p * total, 1e-30)
    undecided = top_p < 1
    while undecided:
        weight, next_id, next_key = _draw_better(scaled, noisy, vocabulary, last_key, min_p, chosen_key, chosen, BLOCK)
        undecided = weight >= limit
        if undecided:
            chosen = next_id
            chosen_key = next_key
    return chosen


@jit()
def choose(
    scaled,
    noisy,
    peaks,
    peak_ids,
    raw_peaks,
    drawn,
    drawn_ids,
    token_ids,
    finite,
    slots,
    flags,
    history,
    temperature,
    top_k,
    top_p,
    min_p,
    vocabulary,
    smallest_temperature,
    PROCESSED: tl.constexpr,
    DRAWN: tl.constexpr,
    FILTERED: tl.constexpr,
    PENALTIES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's token."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    peak = _row_peak(peaks, row, CHUNKS, CHUNKS_2)
    is_finite = _is_finite(peak)
    if PROCESSED:
        is_finite = is_finite & _is_finite(_row_peak(raw_peaks, row, CHUNKS, CHUNKS_2))
    tl.store(finite + row, is_finite.to(tl.int8))
    chunk = tl.arange(0, CHUNKS_2)
    inside = chunk < CHUNKS
    values = tl.load(peaks + row * CHUNKS + chunk, mask=inside, other=float("-inf"))
    ids = tl.load(peak_ids + row * CHUNKS + chunk, mask=inside, other=0)
    _, chosen = _best(values, ids)
    chosen = tl.minimum(chosen, vocabulary - 1)
    if DRAWN:
        heat = tl.load(temperature + slot)
        if (heat >= smallest_temperature) & _is_finite(peak):
            k, p, least, filtered = _filters(slot, top_k, top_p, min_p, vocabulary)
            if FILTERED and filtered:
                at = row * vocabulary
                chosen = _draw_filtered(scaled + at, noisy + at, vocabulary, k, p, least, BLOCK)
            else:
                values = tl.load(drawn + row * CHUNKS + chunk, mask=inside, other=float("-inf"))
                ids = tl.load(drawn_ids + row * CHUNKS + chunk, mask=inside, other=0)
                _, chosen = _best(values, ids)
    tl.store(token_ids + row, chosen.to(tl.int64))
    if PENALTIES and tl.load(flags + row) >= 2:
        at = history + slot * vocabulary + chosen
        tl.store(at, tl.load(at) + 2)
