"""Logits to token ids on the GPU, in Triton; `sampler.py` is its reference on the CPU, with the same interface.

Nothing waits for the device and nothing sorts a vocabulary. Per-row parameters are read from `SamplingState` on the
device; the host, which knows what each row needs, only decides which launches a batch takes:

    process      bias, penalties and bans, into a copy of the logits             rows that need one of these
    find_peaks   largest score of every chunk of the vocabulary                  always
    draw         scores + noise, and the largest of every chunk                  rows with a temperature
    choose       a row's token: of the largest chunk, or after top-k/top-p/min-p always

A row's result depends on its own logits, parameters and position alone: chunks have one size, and a row that is
filtered is walked through by one program.
"""

from collections.abc import Sequence

import torch

from ropeway.kernels.sampler import Sampled, Sampler
from ropeway.kernels.sampling_state import SMALLEST_TEMPERATURE, Needs
from ropeway.kernels.triton_jit import ceil_div, next_power_of_2, upload
from ropeway.kernels.triton_sampler_kernels import choose, draw, find_peaks, process

BLOCK = 4096
"""Tokens per chunk."""


class TritonSampler(Sampler):
    """Samples one token per row, and counts it where the row has penalties."""

    def sample(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> Sampled:
        """logits [L, V] contiguous (unchanged); slots [L] int64 on the host, of rows that have joined, each once;
        positions [L] int64 on the host, of the token to be sampled in its sequence."""
        needs = [self._needs(slot) for slot in slots.tolist()]
        flags = torch.tensor([row.bias + 2 * row.penalties for row in needs])
        inputs = upload(torch.stack((slots, positions, flags)), logits.device)
        bans = [
            (index, token_id)
            for index, (row, position) in enumerate(zip(needs, positions.tolist(), strict=True))
            if position < row.ban_stop_until
            for token_id in row.stop_token_ids
        ]
        token_ids, finite = self.launch(logits, inputs, needs, bans)
        return Sampled(token_ids, finite, *_logprobs(logits, token_ids, [row.logprobs for row in needs]))

    def launch(
        self, logits: torch.Tensor, inputs: torch.Tensor, needs: list[Needs], bans: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part without logprobs: only launches, on what is on the device, so that it can be captured in a graph.

        inputs [3, L] int64: slots, positions, flags. Returns ids [L] int64 and whether rows are finite [L] bool."""
        state, (rows, vocabulary) = self.state, logits.shape
        slots, positions, flags = inputs.unbind()
        biased, penalised = any(row.bias for row in needs), any(row.penalties for row in needs)
        drawn = any(not row.greedy for row in needs)
        filtered = any(not row.greedy and row.filtered for row in needs)
        chunks = ceil_div(vocabulary, BLOCK)
        peaks, raw_peaks, drawn_peaks = logits.new_empty(3, rows, chunks, dtype=torch.float32).unbind()
        peak_ids, drawn_ids = logits.new_empty(2, rows, chunks, dtype=torch.int32).unbind()
        scores = logits
        history = inputs if state.history is None else state.history
        if biased or penalised or bans:
            scores = torch.empty_like(logits, dtype=torch.float32)
            process[(rows, chunks)](
                *(logits, scores, raw_peaks, slots, flags, inputs if state.bias is None else state.bias, history),
                *(state.repetition_penalty, state.frequency_penalty, state.presence_penalty, vocabulary),
                BIAS=biased,
                PENALTIES=penalised,
                BLOCK=BLOCK,
            )
        if bans:
            at = upload(torch.tensor(bans).T.contiguous(), logits.device)
            scores.index_put_((at[0], at[1]), scores.new_full((), -torch.inf))
        find_peaks[(rows, chunks)](scores, peaks, peak_ids, vocabulary, BLOCK=BLOCK)
        cut = {"FILTERED": filtered, "CHUNKS": chunks, "CHUNKS_2": next_power_of_2(chunks), "BLOCK": BLOCK}
        filters = (state.top_k, state.top_p, state.min_p, vocabulary, SMALLEST_TEMPERATURE)
        scaled, noisy = logits.new_empty(2, *(logits.shape if filtered else (1, 1)), dtype=torch.float32).unbind()
        if drawn:
            draw[(rows, chunks)](
                *(scores, peaks, drawn_peaks, drawn_ids, scaled, noisy, slots, positions),
                *(state.temperature, state.seed, *filters),
                **cut,
            )
        token_ids = torch.empty_like(slots)
        finite = torch.empty_like(slots, dtype=torch.int8)
        choose[(rows,)](
            *(scaled, noisy, peaks, peak_ids, raw_peaks, drawn_peaks, drawn_ids, token_ids, finite),
            *(slots, flags, history, state.temperature, *filters),
            PROCESSED=scores is not logits,
            DRAWN=drawn,
            PENALTIES=penalised,
            **cut,
            num_warps=32 if filtered else 1,
        )
        return token_ids, finite.view(torch.bool)


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, wanted: Sequence[int | None]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(chosen [L], top ids [L, K], their logprobs [L, K]), log-softmax in fp32 of the model's own logits."""
    asked = [index for index, count in enumerate(wanted) if count is not None]
    if not asked:
        return None, None, None
    rows = upload(torch.tensor(asked), logits.device)
    logprobs = logits[rows].float().log_softmax(-1)
    chosen = logits.new_zeros(len(wanted), dtype=torch.float32)
    chosen[rows] = logprobs.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1)
    k = min(max(count or 0 for count in wanted), logits.shape[1])
    if not k:
        return chosen, None, None
    # One integer per token that orders by logprob, then by id; a plain topk leaves the order of equals open.
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    order = (logprobs.abs().view(torch.int32).to(torch.int64) << 32) | vocabulary
    best = order.topk(k, largest=False).values & 0xFFFFFFFF
    top_ids = torch.zeros(len(wanted), k, dtype=torch.int64, device=logits.device)
    top_logprobs = chosen.new_zeros(len(wanted), k)
    top_ids[rows], top_logprobs[rows] = best, logprobs.gather(1, best)
    return chosen, top_ids, top_logprobs
