"""Pace: how many prompt tokens may ride along with rows that decode. Enough to use the device, few enough that the
others' tokens keep coming.

A step with n prompt tokens beside decoding rows takes d + m n seconds: d without them, m more for each. Both are learnt
from the steps themselves, as exponentially weighted means, so they follow the model, the device, the number of rows and
the length of their contexts; and so is w, the least that a whole step ever cost per prompt token.

How much at once? n = (T - d) / m for a step of T seconds. Large chunks use a device better, since what is dear about a
mixed step whatever its n comes less often, and nobody minds a gap of `GAP`. So T is that; but at most `LONGEST` d, or a
small model's tokens would come in fits, and at least `SHORTEST` d, or a slow device would never end a prompt. While
prompt tokens hide behind the reading of the weights m is nearly 0 and says nothing about a larger n: n is at most
T / w, what such a step could hold by itself. And m counts as at most `DEAREST` w: a mixed step that is slow whatever
its n, for want of a CUDA graph perhaps, must not make n small.

How often, and how much then? As those who wait for their first token are, beside those who decode:

    many    more than one, and at least 1 for each `MANY`: after a start or in a burst. T is `BURST`, or `LONGEST` d if
            that is more: all are held up, for a batch that fills slowly ends slowly, its last rows alone. Where d alone
            is more than `GAP`, nothing comes smoothly: the whole budget
    some    a chunk in every step
    few     one, or at most 1 for each `FEW`. Chunks take turns with decode steps, which get `TURN` times as long: a
            client who brings one long prompt after the other would take most of the time from all others, in every gap

That is for `latency`: of first tokens and most others. For `throughput` nobody reads along: prompts get each step's
whole budget, so that all rows decode together soon. For `smoothness` T is `SMOOTH` d whoever waits: gaps stay below
three decode steps.

Where steps are rounded up to certain sizes, a chunk ends with one of them: pads cost what tokens cost.

Pure arithmetic. Knows no rows and no clock: the caller measures.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

Goal = Literal["latency", "throughput", "smoothness"]

GAP, BURST = 0.025, 0.05
"""Seconds of a mixed step: 40 tokens per second are faster than anyone reads, and 20 are for a while."""
LONGEST, SHORTEST, SMOOTH = 6.0, 2.5, 2.8
"""A mixed step / a step that only decodes, at most, at least, and always."""
DEAREST = 4.0
"""A prompt token beside decoding rows / one in the cheapest step; long contexts make a token no dearer than that."""
MANY, FEW = 16, 24
"""Rows that decode for each that waits."""
TURN = 1.5
"""Seconds of decode steps after each second that a chunk took, while few wait."""
FLOOR = 16
"""Prompt tokens that may ride along whatever they cost: prompts end."""
LARGE = 2
"""A step of at least so many times the largest size is worth the launch of its kernels one by one."""
PROBE_STEPS = 32
"""Mixed steps after which none ride along in one, so that d is known while prompts never stop coming."""
SOON = 4
"""So many at first."""
WEIGHT = 0.25
"""Of the newest measurement in the means."""
OUTLIER = 2.0
"""A measurement counts as at most so many times the mean: a kernel that was compiled is no trend."""
DRIFT = 1.002
"""The least cost per token is forgotten by so much per step: contexts grow."""


class Pace:
    """The share of prefill in the steps of one engine. Times in seconds."""

    def __init__(self, sizes: Sequence[int] = (), goal: Goal = "latency") -> None:
        """sizes: tokens of the steps that are computed without pads, ascending; larger steps have none, nor a graph."""
        self.sizes = sizes
        self.goal = goal
        self._decode: float | None = None
        """d"""
        self._beside: float | None = None
        """m"""
        self._whole: float | None = None
        """w"""
        self._until_probe = SOON
        self._rest = 0.0
        """Decode steps that have their turn before the next chunk, if few wait."""

    @property
    def share(self) -> int:
        """Prompt tokens that may ride along with decoding rows in a step: at least `FLOOR`, now and then 0."""
        if not self._until_probe:
            return 0
        return FLOOR if self._decode is None else self._tokens_in(self._longest(self._decode))

    def share_beside(self, decoding: int, waiting: int, budget: int) -> int:
        """Of `budget` prompt tokens, those that may ride along in the next step.

        Args:
            decoding: rows in it that compute their newest token.
            waiting: rows that wait for their first token and could have a place.
        """
        if self.goal == "throughput":
            return budget
        share = self.share
        if self.goal == "latency" and share and waiting > 1 and decoding <= MANY * waiting:
            if (self._decode or 0) > GAP:
                return budget
            share = max(share, self._tokens_in(max(BURST, LONGEST * (self._decode or 0))))
        elif self._rest >= 1 and (waiting == 1 or decoding >= FEW * waiting):
            return 0
        return min(self._without_pads(decoding, share), budget)

    def launched(self, prefill_tokens: int) -> None:
        """A step with rows that decode was launched, and so many prompt tokens with them."""
        if not prefill_tokens:
            self._rest = max(self._rest - 1, 0.0)
        elif self._decode is not None and self._whole is not None:
            extra = min(prefill_tokens * self._per_token(self._whole), self._longest(self._decode) - self._decode)
            self._rest = TURN * extra / self._decode

    def observe(self, decode_rows: int, prefill_tokens: int, seconds: float) -> None:
        """A step was measured.

        Args:
            decode_rows: rows that computed their newest token only.
            prefill_tokens: all other tokens of the step.
            seconds: from the end of the step before, or from the launch if that was later, to its own end; above 0.
        """
        if prefill_tokens:
            whole = seconds / prefill_tokens
            self._whole = whole if self._whole is None else min(whole, DRIFT * self._whole)
        if decode_rows and not prefill_tokens:
            self._decode = _mean(self._decode, seconds)
            self._until_probe = PROBE_STEPS
        elif decode_rows:
            self._until_probe = max(self._until_probe - 1, 0)
            if self._decode is not None and self._whole is not None:
                beside = max(seconds - self._decode, 0.0) / prefill_tokens
                self._beside = _mean(max(self._beside or self._whole, self._whole / 2), beside)

    def _longest(self, decode: float) -> float:
        """T"""
        if self.goal == "smoothness":
            return SMOOTH * decode
        return max(SHORTEST * decode, min(GAP, LONGEST * decode))

    def _tokens_in(self, seconds: float) -> int:
        """n for T, as far as d, m and w are known."""
        if self._whole is None:
            return FLOOR
        beside = (seconds - (self._decode or 0)) / self._per_token(self._whole)
        return max(FLOOR, int(min(beside, seconds / self._whole)))

    def _per_token(self, whole: float) -> float:
        """m, as far as it is known and believed."""
        return whole if self._beside is None else min(self._beside, DEAREST * whole)

    def _without_pads(self, decoding: int, share: int) -> int:
        """The share, less what would need the next larger size."""
        place = bisect_right(self.sizes, decoding + share)
        if not place or decoding + share >= LARGE * self.sizes[-1]:
            return share
        fitting = self.sizes[place - 1] - decoding
        return fitting if fitting >= FLOOR else share


def _mean(mean: float | None, value: float) -> float:
    """The mean with one more value."""
    if mean is None:
        return value
    return mean + WEIGHT * (min(value, OUTLIER * mean) - mean)
