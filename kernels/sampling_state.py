"""What the sampler knows about each row: parameters and token counts on the device, and which work a row needs.

A row keeps its place (`state_slot`) from the step it joins to the step it leaves; only `join` and the sampler write.
Values are trusted: `server/` has validated them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import RowState

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


class SamplingState:
    """Persistent per-row parameters on the device, updated when rows join.

    Tensors of one value per slot: `temperature top_p min_p repetition_penalty frequency_penalty presence_penalty`
    fp32, `top_k seed` int64. Tensors of one value per slot and token, made when the first row needs them:
    `bias` fp32 (logit bias; -inf where a token is never allowed) and `history` int32.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.device = device
        self.needs: list[Needs | None] = [None] * num_slots
        self.temperature = torch.ones(num_slots, device=device)
        self.top_p = torch.ones(num_slots, device=device)
        self.min_p = torch.zeros(num_slots, device=device)
        self.repetition_penalty = torch.ones(num_slots, device=device)
        self.frequency_penalty = torch.zeros(num_slots, device=device)
        self.presence_penalty = torch.zeros(num_slots, device=device)
        self.top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.bias: torch.Tensor | None = None
        self.history: torch.Tensor | None = None
        """2 * times in the output + 1 if in the prompt."""

    def join(self, joins: Sequence[RowState]) -> None:
        """Fills the slots of rows that join. A row that joins again with its `output_ids` goes on as if never gone."""
        if not joins:
            return
        slots = torch.tensor([row.state_slot for row in joins], device=self.device)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            self._write(name, slots, [getattr(row.params, name) for row in joins])
        self._write("top_k", slots, [row.params.top_k for row in joins])
        self._write("seed", slots, [row.params.seed for row in joins])
        for row in joins:
            needs = Needs.of(row.params, len(row.prompt_ids), self.vocab_size)
            self.needs[row.state_slot] = needs
            if needs.bias:
                self._fill_bias(row)
            if needs.penalties:
                self._fill_history(row)

    def count(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Adds sampled tokens to the history: slots [R] int64, token_ids [R] int64, both on the device."""
        assert self.history is not None
        self.history.index_put_((slots, token_ids), self.history.new_full((), 2), accumulate=True)

    def _write(self, name: str, slots: torch.Tensor, values: list[float]) -> None:
        tensor: torch.Tensor = getattr(self, name)
        tensor[slots] = torch.tensor(values, dtype=tensor.dtype, device=self.device)

    def _fill_bias(self, row: RowState) -> None:
        if self.bias is None:
            self.bias = torch.zeros(self.num_slots, self.vocab_size, device=self.device)
        bias, params = self.bias[row.state_slot], row.params
        bias.fill_(-torch.inf if params.allowed_token_ids else 0)
        bias[self._ids(params.allowed_token_ids)] = 0
        values = [value if value > BANNED_BIAS else -torch.inf for value in params.logit_bias.values()]
        bias[self._ids(list(params.logit_bias))] += torch.tensor(values, dtype=torch.float32, device=self.device)

    def _fill_history(self, row: RowState) -> None:
        if self.history is None:
            self.history = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.int32, device=self.device)
        history, output = self.history[row.state_slot], self._ids(row.output_ids)
        history.zero_()
        history[self._ids(row.prompt_ids)] = 1
        history.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)
