"""Logits to token ids on the GPU, in Triton; `sampler.py` is its reference on the CPU, with the same interface.

Nothing waits for the device and nothing sorts a vocabulary. Per-row parameters are read from `SamplingState` on the
device; the host, which knows what each row needs, only decides which launches a batch takes:

    process      bias, penalties and bans, into a copy of the logits             rows that need one of these
                 edits, by whatever they launch                                  or have an edit
    find_peaks   largest score of every chunk of the vocabulary                  always
    draw         largest score + noise of every chunk                            rows with a temperature, no top-k
    choose       a row's token: of the largest chunk, or after top-k and top-p   always

There are three kinds of batches, each a superset of the one before, so that few kernels are compiled: `greedy`,
`drawn` and `processed`. A row's result depends on its own logits, parameters and position alone: chunks have one size,
and what top-k and top-p may keep of a row is looked through by one program.
"""

from collections.abc import Mapping, Sequence
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
        state, (rows, vocabulary) = self.state, logits.shape
        processed, drawn = kind == "processed", kind != "greedy"
        slots, positions, flags = lines.slots, lines.positions, lines.flags
        chunks = ceil_div(vocabulary, BLOCK)
        peaks, raw_peaks, drawn_peaks = (logits.new_empty(rows, chunks, dtype=torch.float32) for _ in range(3))
        peak_ids, drawn_ids = (logits.new_empty(rows, chunks, dtype=torch.int32) for _ in range(2))
        scores = logits
        # Tables that no row has asked for are not read: anything of their dtype stands for them.
        history = peak_ids if state.history is None else state.history
        if processed:
            scores = torch.empty_like(logits, dtype=torch.float32)
            process[(rows, chunks)](
                *(logits, scores, raw_peaks, slots, flags, peaks if state.bias is None else state.bias, history),
                *(state.repetition_penalty, state.frequency_penalty, state.presence_penalty, vocabulary),
                BIAS=True,
                PENALTIES=True,
                BLOCK=BLOCK,
            )
        if bans:
            at = upload(torch.tensor(bans).T.contiguous(), logits.device)
            scores.index_put_((at[0], at[1]), scores.new_full((), -torch.inf))
        lines.errors.update(apply_edits(scores, lines.edits))
        group_peaks = logits.new_empty(rows, chunks * (BLOCK // GROUP) if drawn else 0, dtype=torch.float32)
        find_peaks[(rows, chunks)](
            scores, peaks, peak_ids, group_peaks, vocabulary, GROUPS=drawn, GROUP=GROUP, BLOCK=BLOCK
        )
        cut = {"CHUNKS": chunks, "CHUNKS_2": next_power_of_2(chunks), "BLOCK": BLOCK, "FAST": logits.is_cuda}
        filters = (state.top_k, state.top_p, state.min_p, vocabulary, SMALLEST_TEMPERATURE)
        weights = torch.empty_like(peaks)
        if drawn:
            draw[(rows, chunks)](
                *(scores, peaks, drawn_peaks, drawn_ids, weights, slots, positions),
                *(state.temperature, state.seed, *filters),
                **cut,
                num_warps=8,
            )
        choose[(rows,)](
            *(scores, peaks, peak_ids, raw_peaks, drawn_peaks, drawn_ids, weights),
            *(group_peaks, torch.empty_like(group_peaks, dtype=torch.int32)),
            *(lines.token_ids, lines.finite.view(torch.int8), slots, flags, positions, history),
            *(state.temperature, state.seed, *filters),
            PROCESSED=processed,
            DRAWN=drawn,
            PENALTIES=processed,
            GROUP=GROUP,
            **cut,
            num_warps=32 if drawn else 1,
        )
        return scores

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
