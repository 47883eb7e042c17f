"""Edits of rows that form groups: what beams report, and guidance.

See `row_edits.RowEdit`, `beam.py` and `guidance.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ropeway.kernels.noise import gumbel
from ropeway.scheduler.beam import LOG_SOFTMAX, REPORT, Candidates
from ropeway.scheduler.guidance import GUIDANCE
from ropeway.scheduler.row import BuildEdit, Row
from ropeway.scheduler.row_edits import RowEdit


class LogSoftmax:
    """Log-probabilities in place of logits: processors of a beam search act on them, as in `generate()`."""

    ready = True

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        scores.copy_(scores.log_softmax(-1))

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        return None

    def fork(self, row: Row) -> RowEdit:
        return self


class Report:
    """The likeliest `count` tokens of a beam, on their way to the host while the step goes on.

    With `do_sample` they are drawn without replacement: adding Gumbel noise to log-probabilities and taking the largest
    is the same (Vieira 2014; Kool et al. 2019), and the noise is a function of the row's seed and the position.
    """

    ready = True

    def __init__(self, row: Row, count: int, do_sample: bool) -> None:
        self._seed = row.sampling.seed
        self._count = count
        self._do_sample = do_sample
        self._host: torch.Tensor | None = None

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        """Changes nothing: scores [V] are processed log-probabilities."""
        count = min(self._count, len(scores))
        noise = self._noise(len(token_ids), scores) if self._do_sample else torch.zeros_like(scores)
        ids = (scores + noise).topk(count).indices
        best = torch.stack((scores[ids], noise[ids])).float().view(torch.int32)
        packed = torch.cat((ids.to(torch.int32).unsqueeze(0), best))
        host = torch.empty_like(packed, device="cpu", pin_memory=scores.is_cuda)
        self._host = host.copy_(packed, non_blocking=True)

    def _noise(self, position: int, scores: torch.Tensor) -> torch.Tensor:
        device = scores.device
        seed, place = (torch.full((1,), value, device=device) for value in (self._seed, position))
        return gumbel(seed, place, torch.arange(len(scores), device=device))[0]

    def candidates(self) -> Candidates:
        """See `beam.Reporter`."""
        assert self._host is not None
        ids, scores, noise = self._host
        return Candidates(ids.numpy(), scores.view(torch.float32).numpy(), noise.view(torch.float32).numpy())

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        return None

    def fork(self, row: Row) -> RowEdit:
        return Report(row, self._count, self._do_sample)


class Unconditional:
    """Keeps the log-probabilities of the row with the negative prompt, on their device."""

    ready = True

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None
        """[V] fp32"""

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        self.scores = scores.log_softmax(-1)

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        return None


class Guided:
    """transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor: away from what the negative prompt makes likely."""

    ready = True

    def __init__(self, scale: float, unconditional: Unconditional) -> None:
        self._scale = scale
        self._unconditional = unconditional

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        other = self._unconditional.scores
        assert other is not None, "the unconditional row comes first"
        banned = scores == -torch.inf
        scores.copy_(self._scale * (scores.log_softmax(-1) - other) + other)
        scores.masked_fill_(banned, -torch.inf)

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        return None


def _log_softmax(args: dict[str, Any], row: Row) -> RowEdit:
    """Builder of a beam's first edit."""
    return LogSoftmax()


def _report(args: dict[str, Any], row: Row) -> RowEdit:
    """Builder of a beam's last edit."""
    return Report(row, args["count"], args["do_sample"])


def _guidance(args: dict[str, Any], row: Row) -> RowEdit:
    """Builder of the edit of either row of a pair; the unconditional row's comes first."""
    if row.after is None:
        return Unconditional()
    unconditional = row.after.edits[0]
    assert isinstance(unconditional, Unconditional)
    return Guided(args["scale"], unconditional)


SEARCH_EDITS: dict[str, BuildEdit] = {LOG_SOFTMAX: _log_softmax, REPORT: _report, GUIDANCE: _guidance}
"""Kind of the `EditSpec` -> its builder."""
