"""Logits to token ids on the GPU, in Triton; `sampler.py` is its reference on the CPU, with the same interface.

Nothing waits for the device and nothing sorts a vocabulary. Per-row parameters are read from `SamplingState` on the
device; the host, which knows what each row needs, only decides which launches a batch takes, by its neediest row:

    process      bias, penalties and bans, into a copy of the logits             a row that needs one of these
                 edits, by whatever they launch                                  or has an edit
    find_peaks   largest score of every chunk of the vocabulary                  always
    draw         largest score + noise of every chunk                            a row that has a temperature
    choose       a row's token: of the largest chunk, or after top-k and top-p   always

There are three kinds of batches, each a superset of the one before, so that few kernels are compiled: `greedy`,
`drawn` and `processed`. A row's result depends on its own logits, parameters and position alone: chunks have one size,
and what top-k and top-p may keep of a row is looked through by one program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from ropeway.kernels.logprobs import chosen_logprobs
from ropeway.kernels.sampler import Lines, Sampled, Sampler, apply_edits
from ropeway.kernels.sampling_state import DRAWN, FLAGS, SMALLEST_TEMPERATURE
from ropeway.kernels.step import Edit
from ropeway.kernels.triton_jit import ceil_div, next_power_of_2, upload
from ropeway.kernels.triton_sampler_kernels import choose, draw, find_peaks, process

BLOCK = 4096
"""Tokens per chunk."""
GROUP = 64
"""Tokens per group."""

Kind = Literal["greedy", "drawn", "processed"]
KINDS: tuple[Kind, ...] = ("greedy", "drawn", "processed")


class TritonSampler(Sampler):
    """Samples one token per row, and counts it where the row has penalties."""

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        edits: Mapping[int, Edit] = MappingProxyType({}),
    ) -> Sampled:
        """logits [L, V] contiguous (unchanged); slots [L] int64 on the host, of rows that have joined, each once;
        positions [L] int64 on the host, of the token to be sampled in its sequence."""
        host_slots, host_positions = slots.numpy(), positions.numpy()
        flags = torch.from_numpy(self.state.work[host_slots] & FLAGS)
        slots, positions, flags = (upload(values, logits.device) for values in (slots, positions, flags))
        token_ids = torch.empty_like(slots)
        finite = torch.empty_like(slots, dtype=torch.bool)
        lines = Lines(host_slots, host_positions, slots, positions, flags, token_ids, finite, edits)
        return self.sample_lines(logits, lines)

    def sample_lines(self, logits: torch.Tensor, lines: Lines) -> Sampled:
        """As `sample`, for lines that a step has staged."""
        scores = self.launch(logits, lines, self.kind(lines), self._bans(lines))
        return self.report(scores if self.processed_logprobs else logits, lines)

    def kind(self, lines: Lines) -> Kind:
        """What the neediest line takes."""
        slots = lines.host_slots
        work = int(np.bitwise_or.reduce(self.state.work[slots]))
        if lines.edits or work & FLAGS or (lines.host_positions < self.state.ban_stop_until[slots]).any():
            return "processed"
        return "drawn" if work & DRAWN else "greedy"

    def launch(
        self, logits: torch.Tensor, lines: Lines, kind: Kind, bans: Sequence[tuple[int, int]] = ()
    ) -> torch.Tensor:
        """Only launches, on what is on the device: greedy and drawn lines can be captured in a graph.

        bans: (line, token id) that must not be chosen, with kind processed.

        Returns the scores [L, V] after all that comes before temperature; the logits themselves if nothing does."""
        chunks = _Chunks.of(logits, drawn=kind != "greedy")
        scores = self._process(logits, lines, chunks, bans) if kind == "processed" else logits
        self._pick(scores, lines, chunks, kind)
        return scores

    def _process(
        self, logits: torch.Tensor, lines: Lines, chunks: "_Chunks", bans: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """A copy of the logits [L, V] in fp32 with all that comes before temperature."""
        state = self.state
        scores = torch.empty_like(logits, dtype=torch.float32)
        process[chunks.peaks.shape](
            *(logits, scores, chunks.raw_peaks, lines.slots, lines.flags),
            *(chunks.peaks if state.bias is None else state.bias, self._history(chunks)),
            *(state.repetition_penalty, state.frequency_penalty, state.presence_penalty, logits.shape[1]),
            BIAS=True,
            PENALTIES=True,
            BLOCK=BLOCK,
        )
        if bans:
            at = upload(torch.tensor(bans).T.contiguous(), logits.device)
            scores.index_put_((at[0], at[1]), scores.new_full((), -torch.inf))
        lines.errors.update(apply_edits(scores, lines.edits))
        return scores

    def _pick(self, scores: torch.Tensor, lines: Lines, chunks: "_Chunks", kind: Kind) -> None:
        """Every line's token, from its scores."""
        state, vocabulary, drawn = self.state, scores.shape[1], kind != "greedy"
        grid, count = chunks.peaks.shape, chunks.peaks.shape[1]
        find_peaks[grid](
            *(scores, chunks.peaks, chunks.peak_ids, chunks.group_peaks, vocabulary),
            GROUPS=drawn,
            GROUP=GROUP,
            BLOCK=BLOCK,
        )
        cut = {"CHUNKS": count, "CHUNKS_2": next_power_of_2(count), "BLOCK": BLOCK, "FAST": scores.is_cuda}
        filters = (state.top_k, state.top_p, state.min_p, vocabulary, SMALLEST_TEMPERATURE)
        if drawn:
            draw[grid](
                *(scores, chunks.peaks, chunks.drawn_peaks, chunks.drawn_ids, chunks.weights),
                *(lines.slots, lines.positions, state.temperature, state.seed, *filters),
                **cut,
                num_warps=8,
            )
        choose[grid[:1]](
            *(scores, chunks.peaks, chunks.peak_ids, chunks.raw_peaks),
            *(chunks.drawn_peaks, chunks.drawn_ids, chunks.weights, chunks.group_peaks, chunks.listed),
            *(lines.token_ids, lines.finite.view(torch.int8), lines.slots, lines.flags, lines.positions),
            *(self._history(chunks), state.temperature, state.seed, *filters),
            PROCESSED=kind == "processed",
            DRAWN=drawn,
            PENALTIES=kind == "processed",
            GROUP=GROUP,
            **cut,
            num_warps=32 if drawn else 1,
        )

    def _history(self, chunks: "_Chunks") -> torch.Tensor:
        """A table that no row has asked for is not read: anything of its dtype stands for it."""
        return chunks.peak_ids if self.state.history is None else self.state.history

    def report(self, logits: torch.Tensor, lines: Lines) -> Sampled:
        """What `launch` gave, with the logprobs of the lines that want them. logits: the model's own, or what `launch`
        returned if logprobs are to be those of what is drawn from."""
        asked = np.flatnonzero(self.state.wants_logprobs[lines.host_slots])
        if not len(asked):
            return Sampled(lines.token_ids, lines.finite, errors=lines.errors)
        needs = [self._needs(slot) for slot in lines.host_slots.tolist()]
        if self.processed_logprobs:
            logits = self._distribution(logits[: len(needs)], lines.slots[: len(needs)], needs)
        logprobs = chosen_logprobs(logits, lines.token_ids, [row.logprobs for row in needs])
        return Sampled(lines.token_ids, lines.finite, *logprobs, errors=lines.errors)

    def _bans(self, lines: Lines) -> list[tuple[int, int]]:
        """Stop tokens of lines that are too short to end."""
        early = np.flatnonzero(lines.host_positions < self.state.ban_stop_until[lines.host_slots])
        slots = lines.host_slots[early].tolist()
        return [
            (line, token_id)
            for line, slot in zip(early.tolist(), slots, strict=True)
            for token_id in self._needs(slot).stop_token_ids
        ]


@dataclass(slots=True, frozen=True)
class _Chunks:
    """What the launches of one batch tell each other of the C chunks of every line's scores; nothing is written yet."""

    peaks: torch.Tensor
    """[L, C] fp32, the largest score."""
    peak_ids: torch.Tensor
    """[L, C] int32, the token that has it."""
    raw_peaks: torch.Tensor
    """[L, C] fp32, the largest of the model's own logits."""
    drawn_peaks: torch.Tensor
    """[L, C] fp32, the largest score + noise."""
    drawn_ids: torch.Tensor
    """[L, C] int32, the token that has it."""
    weights: torch.Tensor
    """[L, C] fp32, what the chunk's tokens weigh together."""
    group_peaks: torch.Tensor
    """[L, G] fp32, the largest score of each group of tokens; empty where no line draws."""
    listed: torch.Tensor
    """[L, G] int32, groups that a line's top-k and top-p look through."""

    @classmethod
    def of(cls, logits: torch.Tensor, *, drawn: bool) -> "_Chunks":
        rows, chunks = len(logits), ceil_div(logits.shape[1], BLOCK)
        peaks, raw_peaks, drawn_peaks, weights = (logits.new_empty(rows, chunks, dtype=torch.float32) for _ in range(4))
        peak_ids, drawn_ids = (logits.new_empty(rows, chunks, dtype=torch.int32) for _ in range(2))
        group_peaks = logits.new_empty(rows, chunks * (BLOCK // GROUP) if drawn else 0, dtype=torch.float32)
        listed = torch.empty_like(group_peaks, dtype=torch.int32)
        return cls(peaks, peak_ids, raw_peaks, drawn_peaks, drawn_ids, weights, group_peaks, listed)
