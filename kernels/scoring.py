"""Logprobs of tokens that are known already: a prompt's, each given those before it.

A step that scores has more lines of logits than rows. They are computed in fp32 a slice at a time, so that a large
vocabulary costs a bounded amount of memory whatever the prompts' length; the scheduler bounds the lines of a step
(`step.scores_per_step`). Knows logits and ids; no row, no request.

    logits   line 0 | line 1 | line 2 | line 3 | ...      ascending by token, as `LeftPaddedBatch.logits_index`
    scored     x        x        x
    sampled                      x        x               the last token of each row, as ever
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.logprobs import most_likely
from ropeway.kernels.step import Score, ScoredToken
from ropeway.kernels.triton_jit import upload

SLICE_BYTES = 2**25
"""Of the logits in fp32 that are looked at together; work on them takes some times as much."""


def bytes_of_scores(scores: int, vocab_size: int) -> int:
    """The most bytes that scoring so many tokens in a step takes, logits and work on them."""
    logits = 4 * scores * vocab_size
    return logits + 8 * min(logits, SLICE_BYTES)


@dataclass(slots=True, frozen=True)
class Scored:
    """One line per scored token."""

    logprobs: torch.Tensor
    """[S] fp32."""
    ranks: torch.Tensor
    """[S] int64."""
    top_ids: torch.Tensor
    """[S, K] int64."""
    top_logprobs: torch.Tensor
    """[S, K] fp32."""

    def on_host(self) -> "Scored":
        """A copy in memory that a GPU can write to while nobody waits."""
        results = (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        hosts = [torch.empty_like(one, device="cpu", pin_memory=one.is_cuda) for one in results]
        return Scored(*(host.copy_(one, non_blocking=True) for host, one in zip(hosts, results, strict=True)))


def score_tokens(logits: torch.Tensor, lines: torch.Tensor, targets: torch.Tensor, k: int) -> Scored:
    """Logits [L, V], lines [S] int64, the id [S] int64 that each of them is asked for -> logprobs, k most likely.

    Log-softmax in fp32 of the model's own logits."""
    size = max(1, SLICE_BYTES // (4 * logits.shape[1]))
    parts = []
    for begin in range(0, len(lines), size):
        logprobs = logits[lines[begin : begin + size]].float().log_softmax(-1)
        own = logprobs.gather(1, targets[begin : begin + size, None])
        ids = most_likely(logprobs, k)
        parts.append((own[:, 0], (logprobs > own).sum(-1) + 1, ids, logprobs.gather(1, ids)))
    return Scored(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Scoring:
    """What a step's scores want of its logits.

    Args:
        scores: by row; at least one.
        counts: tokens of each row, [B].
    """

    def __init__(self, scores: Mapping[int, Score], counts: np.ndarray) -> None:
        self._scores = scores
        ends = np.cumsum(counts)
        starts = ends - counts
        scored = [np.arange(starts[row], starts[row] + len(score.targets)) for row, score in scores.items()]
        self._scored_tokens = np.concatenate(scored)
        self._sampled_tokens = ends - 1
        self._tokens = np.union1d(self._scored_tokens, self._sampled_tokens)

    def widen(self, batch: LeftPaddedBatch) -> LeftPaddedBatch:
        """The batch with a line of logits for every token that is scored, too."""
        index = upload(torch.from_numpy(self._tokens), batch.logits_index.device)
        return replace(batch, logits_index=index, logits_tokens=tuple(self._tokens.tolist()))

    def sampled(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] of the lines [L, V] of such a batch: those of the rows' last tokens."""
        return logits[self._lines(self._sampled_tokens, logits.device)]

    def score(self, logits: torch.Tensor) -> Scored:
        """Of the same lines those that are scored."""
        targets = torch.tensor([id for score in self._scores.values() for id in score.targets])
        lines = self._lines(self._scored_tokens, logits.device)
        k = min(max(score.top for score in self._scores.values()), logits.shape[1])
        return score_tokens(logits, lines, upload(targets, logits.device), k)

    def tokens(self, scored: Scored) -> dict[int, list[ScoredToken]]:
        """By row, from what `score` gave, on the host."""
        columns = (scored.logprobs, scored.ranks, scored.top_ids, scored.top_logprobs)
        lines = zip(*(column.tolist() for column in columns), strict=True)
        return {row: [_token(next(lines), score.top) for _ in score.targets] for row, score in self._scores.items()}

    def _lines(self, tokens: np.ndarray, device: torch.device) -> torch.Tensor:
        return upload(torch.from_numpy(np.searchsorted(self._tokens, tokens)), device)


def _token(line: tuple[float, int, Sequence[int], Sequence[float]], top: int) -> ScoredToken:
    logprob, rank, ids, logprobs = line
    return ScoredToken(logprob, rank, list(zip(ids[:top], logprobs[:top], strict=True)))
