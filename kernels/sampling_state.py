"""What the sampler knows about each row: parameters and token counts on the device, and which work a row needs.

A row keeps its place (`state_slot`) from the step it joins to the step it leaves; only `join` and the sampler write.
Values are trusted: `server/` has validated them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import RowState
from ropeway.kernels.triton_jit import upload

BANNED_BIAS = -100.0
"""A logit bias of this or less bans the token, as OpenAI's API says."""
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Below it a temperature is 0 in fp32: greedy."""


@dataclass(slots=True, frozen=True)
class Needs:
    """Which work a row needs. Kept on the host, so that work which no row of a batch needs is not launched."""

    greedy: bool
    top_k: int
    """0 = off."""
    top_p: bool
    filtered: bool
    """Top-k, top-p or min-p."""
    penalties: bool
    bias: bool
    """Logit bias or allowed ids."""
    stop_token_ids: tuple[int, ...]
    ban_stop_until: int
    """`stop_token_ids` are banned at positions below this one."""
    logprobs: int | None

    @classmethod
    def of(cls, params: SamplingParams, num_prompt: int, vocab_size: int) -> "Needs":
        top_k = params.top_k if params.top_k < vocab_size else 0
        return cls(
            greedy=params.temperature < SMALLEST_TEMPERATURE,
            top_k=top_k,
            top_p=params.top_p < 1,
            filtered=top_k > 0 or params.top_p < 1 or params.min_p > 0,
            penalties=params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0,
            bias=bool(params.logit_bias or params.allowed_token_ids),
            stop_token_ids=params.stop_token_ids,
            ban_stop_until=num_prompt + params.min_tokens if params.stop_token_ids and params.min_tokens else 0,
            logprobs=params.logprobs,
        )


BIASED, PENALISED, DRAWN = 1, 2, 4
"""Bits of `SamplingState.work`."""
FLAGS = BIASED | PENALISED
"""Those that the sampler's kernels read, too."""
GREEDY = SamplingParams(temperature=0.0)
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


class SamplingState:
    """Persistent per-row parameters on the device, updated when rows join. Nothing here waits for the device.

    Tensors of one value per slot: `temperature top_p min_p repetition_penalty frequency_penalty presence_penalty`
    fp32, `top_k seed` int64. Tensors of one value per slot and token, made when the first row needs them:
    `bias` fp32 (logit bias; -inf where a token is never allowed) and `history` int32.

    Behind the rows' slots, 0 to num_slots - 1, stands one more, `spare`: greedy and plain, for lines that nobody reads.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.device = device
        self.spare = num_slots
        self.needs: list[Needs | None] = [None] * num_slots + [Needs.of(GREEDY, 0, vocab_size)]
        self.work = np.zeros(num_slots + 1, dtype=np.int64)
        """On the host, by slot: `BIASED` | `PENALISED` | `DRAWN`."""
        self.ban_stop_until = np.zeros(num_slots + 1, dtype=np.int64)
        """On the host, by slot: as in `Needs`."""
        self.wants_logprobs = np.zeros(num_slots + 1, dtype=bool)
        """On the host, by slot."""
        self._floats = torch.zeros(len(_FLOATS), num_slots + 1, device=device)
        self._ints = torch.zeros(2, num_slots + 1, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p, *penalties = self._floats.unbind()
        self.repetition_penalty, self.frequency_penalty, self.presence_penalty = penalties
        self.top_k, self.seed = self._ints.unbind()
        for tensor in (self.top_p, self.repetition_penalty):
            tensor.fill_(1)
        self.bias: torch.Tensor | None = None
        self.history: torch.Tensor | None = None
        """2 * times in the output + 1 if in the prompt."""

    def join(self, joins: Sequence[RowState]) -> None:
        """Fills the slots of rows that join. A row that joins again with its `output_ids` goes on as if never gone."""
        if not joins:
            return
        # int64 [6, J]: slots, top_k, seeds, then the six fp32 values of every row, two in the place of one int64
        values = torch.empty(3 + len(_FLOATS) // 2, len(joins), dtype=torch.int64)
        values[0] = torch.tensor([row.state_slot for row in joins])
        values[1] = torch.tensor([row.params.top_k for row in joins])
        values[2] = torch.tensor([row.params.seed for row in joins])
        floats = [[getattr(row.params, name) for row in joins] for name in _FLOATS]
        values[3:].view(torch.float32).view(len(_FLOATS), -1).copy_(torch.tensor(floats))
        values = upload(values, self.device)
        self._ints.index_copy_(1, values[0], values[1:3])
        self._floats.index_copy_(1, values[0], values[3:].view(torch.float32).view(len(_FLOATS), -1))
        for row in joins:
            slot = row.state_slot
            self.needs[slot] = needs = Needs.of(row.params, len(row.prompt_ids), self.vocab_size)
            self.work[slot] = BIASED * needs.bias + PENALISED * needs.penalties + DRAWN * (not needs.greedy)
            self.ban_stop_until[slot] = needs.ban_stop_until
            self.wants_logprobs[slot] = needs.logprobs is not None
            if needs.bias:
                self._fill_bias(row)
            if needs.penalties:
                self._fill_history(row)

    def count(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Adds sampled tokens to the history: slots [R] int64, token_ids [R] int64, both on the device."""
        assert self.history is not None
        self.history.index_put_((slots, token_ids), self.history.new_full((), 2), accumulate=True)

    def _fill_bias(self, row: RowState) -> None:
        if self.bias is None:
            self.bias = torch.zeros(self.num_slots, self.vocab_size, device=self.device)
        bias, params = self.bias[row.state_slot], row.params
        bias.fill_(-torch.inf if params.allowed_token_ids else 0)
        bias.index_fill_(0, self._ids(params.allowed_token_ids), 0)
        values = [value if value > BANNED_BIAS else -torch.inf for value in params.logit_bias.values()]
        bias.index_add_(0, self._ids(list(params.logit_bias)), upload(torch.tensor(values), self.device))

    def _fill_history(self, row: RowState) -> None:
        if self.history is None:
            self.history = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.int32, device=self.device)
        history, output = self.history[row.state_slot], self._ids(row.output_ids)
        history.zero_()
        history.index_fill_(0, self._ids(row.prompt_ids), 1)
        history.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return upload(torch.tensor(ids, dtype=torch.int64), self.device)
