"""Pace: how many prompt tokens may ride along with rows that decode, so that their tokens keep coming evenly.

A step with n prompt tokens beside decoding rows takes d + m n seconds: d without them, m more for each. Both are learnt
from the steps themselves, as exponentially weighted means, so they follow the model, the device, the number of rows and
the length of their contexts. n is chosen so that such a step takes `STRETCH` times d: gaps between tokens stay within a
small multiple of each other, however long the prompts are that others bring. Small chunks cost little: a step that
decodes has to read all weights anyway.

While prompt tokens hide behind that reading, m is nearly 0 and says nothing about a larger n. So m is taken as at least
half of w, the least that a whole step ever cost per prompt token: n grows at most threefold from one step to the next.
And as at most twice w: what is dear about a mixed step whatever its n, a missing CUDA graph for example, must not make
n small.

Where more rows wait for their first token than decode, as after a start or a burst, the many count as the few do: n is
larger by their ratio. A batch would otherwise never fill: its first rows would end before its last ones began.

Pure arithmetic. Knows no rows and no clock: the caller measures.
"""

STRETCH = 2.5
"""A mixed step / a step that only decodes; gaps then stay below 3 times their median with some room."""
FLOOR = 16
"""Prompt tokens that may ride along whatever they cost: prompts end."""
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

    def __init__(self) -> None:
        self._decode: float | None = None
        """d"""
        self._beside: float | None = None
        """m"""
        self._whole: float | None = None
        """w"""
        self._until_probe = SOON

    @property
    def share(self) -> int:
        """Prompt tokens that may ride along with decoding rows in the next step: at least `FLOOR`, now and then 0."""
        if not self._until_probe:
            return 0
        if self._decode is None or self._whole is None:
            return FLOOR
        beside = self._whole if self._beside is None else self._beside
        per_token = min(max(beside, self._whole / 2), 2 * self._whole)
        return max(FLOOR, int((STRETCH - 1) * self._decode / per_token))

    def share_beside(self, decoding: int, waiting: int) -> int:
        """`share`, where so many rows decode and so many wait for their first token and could have a place."""
        return self.share * max(decoding, waiting) // max(decoding, 1)

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
                self._beside = _mean(max(self._beside or 0.0, self._whole / 2), beside)


def _mean(mean: float | None, value: float) -> float:
    """The mean with one more value."""
    if mean is None:
        return value
    return mean + WEIGHT * (min(value, OUTLIER * mean) - mean)
