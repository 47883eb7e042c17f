"""Logits to token ids, for the whole batch at once, each row by its own parameters.

Everything that decides a row's token looks at that row alone. Knows no sequences: what penalties need of the past is
in `SamplingState`. Reductions over a row are maxima, softmax, sorting or integer sums, whose result does not depend on
how many rows there are.

The order is transformers' (`GenerationMixin._get_logits_processor`): bias, penalties, bans, the row's own edit,
temperature, top-k, top-p, min-p. A token is drawn by adding `noise.gumbel` and taking the largest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch

from ropeway.kernels.errors import MAX_ERROR, EditError
from ropeway.kernels.logprobs import chosen_logprobs
from ropeway.kernels.noise import gumbel
from ropeway.kernels.sampling_state import Needs, SamplingState
from ropeway.kernels.step import Edit

Filter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [R, V] fp32, slots [R] int64) -> scores [R, V]."""


@dataclass(slots=True, frozen=True)
class Sampled:
    """One line per row of the logits, on their device."""

    token_ids: torch.Tensor
    """[L] int64; a valid id in any case."""
    finite: torch.Tensor
    """[L] bool: False where the row must end with an error, because its logits hold NaN or +inf or nothing but -inf,
    or because the row's own bias, allowed ids, min_tokens and edit together ban every token: no ban is ever ignored."""
    logprobs: torch.Tensor | None = None
    """[L] fp32, of the chosen id; None if no row asked, undefined in rows that did not."""
    top_ids: torch.Tensor | None = None
    """[L, K] int64, most likely first, equals by lower id; K = the most that a row asked for, None if that is 0."""
    top_logprobs: torch.Tensor | None = None
    """[L, K] fp32."""
    errors: dict[int, str] = field(default_factory=dict)
    """Line -> why its edit failed; what was sampled there means nothing."""


@dataclass(slots=True, frozen=True)
class Lines:
    """The lines of one step's logits: what the host knows of them, the same on the device, and where results go.

    A line that nobody wants has the state's `spare` slot. The host's arrays end where a bucket's pads begin.
    """

    host_slots: np.ndarray
    """[<=L] int64."""
    host_positions: np.ndarray
    """[<=L] int64."""
    slots: torch.Tensor
    """[L] int64: slots of rows that have joined, each once (`spare` may repeat)."""
    positions: torch.Tensor
    """[L] int64: of the token to be sampled in its sequence."""
    flags: torch.Tensor
    """[L] int64: `SamplingState.work & FLAGS` of the slots."""
    token_ids: torch.Tensor
    """[L] int64, written by the sampler."""
    finite: torch.Tensor
    """[L] bool, written by the sampler."""
    edits: Mapping[int, Edit] = field(default_factory=dict)
    """Line -> what changes its scores."""
    errors: dict[int, str] = field(default_factory=dict)
    """Line -> why its edit failed, written by the sampler."""


class Sampler:
    """Samples one token per row, and counts it where the row has penalties."""

    def __init__(self, state: SamplingState, processed_logprobs: bool = False) -> None:
        """processed_logprobs: logprobs are those of what is drawn from, not of the model's own logits."""
        self.state = state
        self.processed_logprobs = processed_logprobs

    def sample_lines(self, logits: torch.Tensor, lines: Lines) -> Sampled:
        """As `sample`, for lines that a step has staged; ids and finiteness are written where `lines` says."""
        slots, positions = torch.from_numpy(lines.host_slots), torch.from_numpy(lines.host_positions)
        sampled = self.sample(logits, slots, positions, lines.edits)
        lines.token_ids.copy_(sampled.token_ids)
        lines.finite.copy_(sampled.finite)
        return sampled

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        edits: Mapping[int, Edit] = MappingProxyType({}),
    ) -> Sampled:
        """logits [L, V] fp32 (unchanged); slots [L] int64, of rows that have joined; positions [L] int64, of the
        token to be sampled in its sequence. `slots` and `positions` are best on the host, where it is decided which
        work the batch needs: on a device they are waited for."""
        needs = [self._needs(slot) for slot in slots.tolist()]
        host_positions = positions.tolist() if any(row.ban_stop_until for row in needs) else []
        slots, positions = slots.to(logits.device), positions.to(logits.device)
        scores = self._processed(logits, slots, needs, host_positions)
        if edits and scores is logits:
            scores = logits.clone()
        errors = apply_edits(scores, edits)
        peaks = scores.amax(-1)
        finite = peaks.isfinite() & logits.amax(-1).isfinite()
        token_ids = self._choose(scores, peaks, slots, positions, needs)
        counted = _rows([row.penalties for row in needs], logits.device)
        if len(counted):
            self.state.count(slots[counted], token_ids[counted])
        wanted = [row.logprobs for row in needs]
        if self.processed_logprobs:
            logits = self._distribution(scores, slots, needs)
        return Sampled(token_ids, finite, *chosen_logprobs(logits, token_ids, wanted), errors=errors)

    def _needs(self, slot: int) -> Needs:
        needs = self.state.needs[slot]
        assert needs is not None, f"no row joined at slot {slot}"
        return needs

    def _processed(
        self, logits: torch.Tensor, slots: torch.Tensor, needs: list[Needs], positions: list[int]
    ) -> torch.Tensor:
        """Bias, penalties and bans."""
        scores = _on_rows(logits, slots, [row.bias for row in needs], self._biased)
        scores = _on_rows(scores, slots, [row.penalties for row in needs], self._penalised)
        bans = [
            (index, token_id)
            for index, position in enumerate(positions)
            if position < needs[index].ban_stop_until
            for token_id in needs[index].stop_token_ids
        ]
        if bans:
            rows, ids = torch.tensor(bans, device=logits.device).unbind(1)
            scores = scores.index_put((rows, ids), scores.new_tensor(-torch.inf))
        return scores

    def _choose(
        self,
        scores: torch.Tensor,
        peaks: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        needs: list[Needs],
    ) -> torch.Tensor:
        """Processed scores [L, V] -> ids [L]."""
        plain = [not row.greedy and not row.filtered for row in needs]
        filtered = [not row.greedy and row.filtered for row in needs]
        if all(plain) or all(filtered):
            return self._draw(scores, peaks, slots, positions, needs)
        token_ids = scores.argmax(-1)
        for rows in (_rows(plain, scores.device), _rows(filtered, scores.device)):
            if len(rows):
                group = [needs[row] for row in rows.tolist()]
                token_ids[rows] = self._draw(scores[rows], peaks[rows], slots[rows], positions[rows], group)
        return token_ids

    def _draw(
        self,
        scores: torch.Tensor,
        peaks: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        needs: list[Needs],
    ) -> torch.Tensor:
        """As `_choose`, for rows that all have a temperature, and either all or none of which are filtered."""
        scores, ids = self._shaped(scores, peaks, slots, needs)
        chosen = (scores + gumbel(self.state.seed[slots], positions, ids)).argmax(-1, keepdim=True)
        return ids.expand_as(scores).gather(1, chosen).squeeze(1)

    def _shaped(
        self, scores: torch.Tensor, peaks: torch.Tensor, slots: torch.Tensor, needs: list[Needs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """After temperature and filters: scores [R, C], ids [R or 1, C]; rows as for `_draw`."""
        # Relative to the row's largest, so that no temperature makes an infinity of a finite score.
        scores = (scores - peaks.unsqueeze(1)) / self.state.temperature[slots].unsqueeze(1)
        ids = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0)
        return self._filter(scores, ids, slots, needs) if needs[0].filtered else (scores, ids)

    def _distribution(self, scores: torch.Tensor, slots: torch.Tensor, needs: list[Needs]) -> torch.Tensor:
        """Processed scores [L, V] -> what the tokens are drawn from, [L, V] fp32, in the lines that want logprobs. A
        greedy line has no temperature and no filter."""
        scores = scores.float().clone()
        drawn = [row.logprobs is not None and not row.greedy for row in needs]
        for filtered in (False, True):
            wanted = [yes and row.filtered == filtered for yes, row in zip(drawn, needs, strict=True)]
            rows = _rows(wanted, scores.device)
            if not len(rows):
                continue
            own = scores[rows]
            group = [row for yes, row in zip(wanted, needs, strict=True) if yes]
            shaped, ids = self._shaped(own, own.amax(-1), slots[rows], group)
            scores[rows] = torch.full_like(own, -torch.inf).scatter_reduce(1, ids.expand_as(shaped), shaped, "amax")
        return scores

    def _filter(
        self, scores: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, needs: list[Needs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Top-k, top-p and min-p: scores [R, V], ids [1, V] -> scores [R, C] (-inf where banned), ids [R or 1, C]."""
        largest_k = max(row.top_k for row in needs)
        scores = _on_rows(
            scores, slots, [row.top_k > 0 for row in needs], lambda s, at: top_k(s, self.state.top_k[at], largest_k)
        )
        probs, p = scores.softmax(-1), self.state.top_p[slots]
        # Min-p bans after top-p what it bans before: neither changes the odds between tokens that stay. Below
        # (1 - p) / V top-p keeps nothing, since all such tokens together have less than 1 - p.
        least = torch.maximum(self.state.min_p[slots] * probs.amax(-1), (1 - p) / scores.shape[1])
        stay = probs >= least.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        scores = scores.masked_fill(~stay, -torch.inf)
        if not scores.is_cuda:  # on a GPU it would have to be waited for how many stay
            scores, probs, ids = _compact(stay, scores, probs, ids)
        if any(row.top_p for row in needs):
            scores = top_p(scores, probs, p)
        return scores, ids

    def _biased(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        assert self.state.bias is not None
        return scores + self.state.bias[slots]

    def _penalised(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Repetition as transformers' RepetitionPenaltyLogitsProcessor; frequency and presence as OpenAI's API
        reference: score -= times in the output * frequency + (1 if in the output) * presence."""
        assert self.state.history is not None
        history = self.state.history[slots]
        repetition = self.state.repetition_penalty[slots].unsqueeze(1)
        repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(history > 0, repeated, scores)
        times = history >> 1
        scores = scores - times * self.state.frequency_penalty[slots].unsqueeze(1)
        return scores - (times > 0) * self.state.presence_penalty[slots].unsqueeze(1)


def apply_edits(scores: torch.Tensor, edits: Mapping[int, Edit]) -> dict[int, str]:
    """Lets each edit change its own line of the scores [L, V] fp32. Returns line -> why its edit failed."""
    errors: dict[int, str] = {}
    for line, edit in edits.items():
        try:
            edit(scores[line])
        except EditError as error:
            errors[line] = str(error)[:MAX_ERROR]
        except Exception as error:
            errors[line] = f"Editing this request's scores failed: {type(error).__name__}: {error}"[:MAX_ERROR]
    return errors


def top_k(scores: torch.Tensor, k: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Bans all but the k best of each row, and what equals the k-th (TopKLogitsWarper). scores [R, V], k [R] int64
    with 1 <= k <= largest_k <= V."""
    best = scores.topk(largest_k).values
    return scores.masked_fill(scores < best.gather(1, k.unsqueeze(1) - 1), -torch.inf)


def top_p(scores: torch.Tensor, probs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keeps a token where those better than it have together less than p (TopPLogitsWarper). Of equals the higher id
    is the better one: transformers sorts ascending, and leaves the order of many equals open. scores [R, C] fp32,
    none above 0; their probs [R, C]; p [R] in (0, 1], 1 = off. Tokens that are not kept anyway may be missing.

    Instead of sorting, the last score that is kept is found digit by digit of its bits (radix selection), by
    histograms of probabilities in steps of 2^-40: integer sums, exact in any order.
    """
    weights = (probs * _ONE).to(torch.int64)
    limit = (p.double() * _ONE).ceil().to(torch.int64).clamp(min=1).masked_fill(p >= 1, _NO_LIMIT)
    keys = scores.abs().view(torch.int32)  # the bits of a float >= 0 order like the float: 0 is the best score
    last, before = _last_key(keys, weights, limit)
    equal = keys == last
    better_equals = equal.flip(-1).cumsum(-1).flip(-1) - 1
    keep = (keys < last) | (equal & (before + better_equals * weights < limit.unsqueeze(1)))
    return scores.masked_fill(~keep, -torch.inf)


_NO_LIMIT = 1 << 62
_ONE = 2.0**40
_DIGITS = ((20, 11), (10, 10), (0, 10))
"""(lowest bit, number of bits) of the digits of a 31-bit key, first the highest."""


def _last_key(keys: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest key of each row such that the keys below it weigh less than `limit`, and what they weigh.

    keys [R, V] int32 >= 0, weights [R, V] int64, limit [R] int64 -> ([R, 1] int32, [R, 1] int64).
    """
    limit = limit.unsqueeze(1)
    prefix, before = keys.new_zeros(len(keys), 1), torch.zeros_like(limit)
    for low, bits in _DIGITS:
        matching = weights * ((keys >> (low + bits)) == prefix)
        digits = ((keys >> low) & ((1 << bits) - 1)).to(torch.int64)
        histogram = weights.new_zeros(len(keys), 1 << bits).scatter_add_(1, digits, matching)
        below = before + histogram.cumsum(1) - histogram
        digit = (below < limit).sum(1, keepdim=True) - 1
        before = below.gather(1, digit)
        prefix = (prefix << bits) | digit.to(torch.int32)
    return prefix, before


def _compact(
    stay: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the tokens that stay to the left, in their order: all [R, V] (ids [1, V]) -> three [R, C], C the most
    that stay in a row; shorter rows are filled with score -inf, prob 0, id 0."""
    rows, columns = stay.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(stay))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(stay), max(int(counts.max()), 1))  # in a row of NaN nothing stays
    kept = scores.new_full(shape, -torch.inf), probs.new_zeros(shape), ids.new_zeros(shape)
    kept[0][rows, places] = scores[rows, columns]
    kept[1][rows, places] = probs[rows, columns]
    kept[2][rows, places] = ids[0, columns]
    return kept


def _rows(wanted: list[bool], device: torch.device) -> torch.Tensor:
    """Indices of the true ones, [R] int64."""
    return torch.tensor([index for index, yes in enumerate(wanted) if yes], dtype=torch.int64, device=device)


def _on_rows(scores: torch.Tensor, slots: torch.Tensor, wanted: list[bool], change: Filter) -> torch.Tensor:
    """Scores [L, V] with `change` applied to the wanted rows; the others cost a copy at most, and nothing if none."""
    if not any(wanted):
        return scores
    if all(wanted):
        return change(scores, slots)
    rows = _rows(wanted, scores.device)
    return scores.index_copy(0, rows, change(scores[rows], slots[rows]))
