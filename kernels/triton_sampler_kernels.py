"""The device code of `triton_sampler.py`, which says in what order it runs and what the state's tensors hold.

A chunk is BLOCK consecutive tokens of the vocabulary. Scores of a drawn row are relative to its largest and divided by
its temperature, so none is above 0: the bits of their magnitude, taken as an integer, order them, 0 being the best.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from ropeway.kernels.triton_filter_kernels import best_of, draw_filtered, gumbel, noise_keys, scaled
from ropeway.kernels.triton_jit import jit, tl


@jit()
def _peak_of(values):
    """The largest, or NaN if one of them is."""
    lost = values != values
    return tl.where(tl.max(lost.to(tl.int32), 0) > 0, float("nan"), tl.max(tl.where(lost, float("-inf"), values), 0))


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
def find_peaks(
    scores, peaks, peak_ids, group_peaks, vocabulary, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest score of one row and chunk, and the lowest id that has it; if GROUPS, that of each group as well."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * vocabulary + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + at, _peak_of(score))
    _, best_id = best_of(score, token)
    tl.store(peak_ids + at, best_id)
    if GROUPS:
        group = tl.arange(0, BLOCK // GROUP)
        numbers = tl.reshape(tl.where(score == score, score, float("-inf")), [BLOCK // GROUP, GROUP])
        tl.store(group_peaks + at * (BLOCK // GROUP) + group, tl.max(numbers, 1))


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
    """A row's k (0 = off), p and least share."""
    k = tl.load(top_k + slot).to(tl.int32)
    k = tl.where(k < vocabulary, k, 0)
    return k, tl.load(top_p + slot), tl.load(min_p + slot)


@jit()
def draw(
    scores,
    peaks,
    drawn,
    drawn_ids,
    weights,
    slots,
    positions,
    temperature,
    seed,
    top_k,
    top_p,
    min_p,
    vocabulary,
    smallest_temperature,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """The largest score + noise of one row and chunk among what min-p leaves, and what the chunk weighs.

    Greedy rows, and those with top-k, are left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot)
    peak = _row_peak(peaks, row, CHUNKS, CHUNKS_2)
    k, p, least = _filters(slot, top_k, top_p, min_p, vocabulary)
    if (heat < smallest_temperature) | (k > 0):
        return
    if not _is_finite(peak):
        return
    key_0, key_1 = noise_keys(tl.load(seed + slot), tl.load(positions + row))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * vocabulary + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    score = scaled(score, peak, heat)
    with_noise = score + gumbel(key_0, key_1, token, FAST)
    at = row * CHUNKS + tl.program_id(1)
    if least > 0:
        with_noise = tl.where(tl.exp(score) >= least, with_noise, float("-inf"))
    if p < 1:
        tl.store(weights + at, tl.sum(tl.exp(score), 0))
    best, best_id = best_of(with_noise, token)
    tl.store(drawn + at, best)
    tl.store(drawn_ids + at, best_id)


@jit()
def choose(
    scores,
    peaks,
    peak_ids,
    raw_peaks,
    drawn,
    drawn_ids,
    weights,
    group_peaks,
    listed,
    token_ids,
    finite,
    slots,
    flags,
    positions,
    history,
    temperature,
    seed,
    top_k,
    top_p,
    min_p,
    vocabulary,
    smallest_temperature,
    PROCESSED: tl.constexpr,
    DRAWN: tl.constexpr,
    PENALTIES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
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
    _, chosen = best_of(values, ids)
    chosen = tl.minimum(chosen, vocabulary - 1)
    if DRAWN:
        heat = tl.load(temperature + slot)
        if (heat >= smallest_temperature) & _is_finite(peak):
            k, p, least = _filters(slot, top_k, top_p, min_p, vocabulary)
            if k == 0:
                values = tl.load(drawn + row * CHUNKS + chunk, mask=inside, other=float("-inf"))
                ids = tl.load(drawn_ids + row * CHUNKS + chunk, mask=inside, other=0)
                _, chosen = best_of(values, ids)
            if (k > 0) | (p < 1):
                total = tl.sum(tl.load(weights + row * CHUNKS + chunk, mask=inside, other=0.0), 0)  # if without top-k
                key_0, key_1 = noise_keys(tl.load(seed + slot), tl.load(positions + row))
                GROUPS: tl.constexpr = CHUNKS * (BLOCK // GROUP)
                chosen = draw_filtered(
                    scores + row * vocabulary, group_peaks + row * GROUPS, listed + row * GROUPS, total, chosen,
                    peak, heat, vocabulary, k, p, least, key_0, key_1,
                    GROUPS, CHUNKS_2 * (BLOCK // GROUP), GROUP, BLOCK, FAST,
                )  # fmt: skip
    tl.store(token_ids + row, chosen.to(tl.int64))
    if PENALTIES and tl.load(flags + row) >= 2:
        at = history + slot * vocabulary + chosen
        tl.store(at, tl.load(at) + 2)
