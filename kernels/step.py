"""What one step is, in plain Python: how the scheduler asks and how the model runner answers.

Knows no tensors, no text, no requests: a row is a place in the batch. `LeftPaddedBatch.build` turns a `StepInput`
into tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ropeway.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

UNREAD = -1
"""Stands for a token that is sampled but not yet read from the device."""

SCORED_BYTES = 2**27
"""Of a step's logits that are there for scores alone, were they fp32."""


def scores_per_step(vocab_size: int) -> int:
    """Tokens of prompts that one step may score: their logits bound its memory."""
    return max(SCORED_BYTES // (4 * vocab_size), 16)


Edit = Callable[["torch.Tensor"], None]
"""edit(scores): changes one row's scores [V] fp32 in place, on their device. Whatever it raises ends that row alone."""


@dataclass(slots=True, frozen=True)
class RowState:
    """A row that joins: fills its place in the persistent sampling state. Filled by `Scheduler.plan`."""

    state_slot: int
    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    """Tokens generated before the row joined (again): after preemption, or after an engine crash."""


@dataclass(slots=True)
class RowInput:
    """One row's part of a step. Filled by `Scheduler.plan`, read by `LeftPaddedBatch.build`.

    sequence   0 ........ start ............... start + len(token_ids)
               in the KV cache  computed in this step   position of the sampled token
    """

    state_slot: int
    token_ids: list[int]
    """The ids to compute; only the last one may be `UNREAD`."""
    start: int
    """Position of the first of them = tokens of the row already in the cache."""
    block_table: list[int]
    """KV blocks that cover [0, start + len(token_ids)); 0 where a block was freed because no layer sees it any more.
    From the step in which the row joins until it leaves, the table only grows."""
    prev_row: int = -1
    """Row of the previous step whose sampled id is the `UNREAD` token; -1 if there is none."""
    sample: bool = True
    """Whether a token is sampled from the last token's logits (False: a prefill chunk with more to come)."""
    edit: Edit | None = None
    """Called once, with `sample`, between forward and sampler: after bias, penalties and bans, before temperature,
    top-k, top-p and min-p, as custom processors are in transformers. The launches of a GPU are not waited for."""


@dataclass(slots=True, frozen=True)
class Score:
    """Known tokens of a row whose logprobs are wanted: of each the one given those before it."""

    targets: list[int]
    """At least one: the ids that follow the row's first `len(targets)` tokens of this step."""
    top: int
    """Most likely tokens to report at each place."""


@dataclass(slots=True)
class StepInput:
    """All that one step computes, in the order in which it happens: joins, copies, forward, sampling."""

    rows: list[RowInput]
    joins: list[RowState] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source block, destination block), copied in every layer before the forward (copy on write)."""
    scores: dict[int, Score] = field(default_factory=dict)
    """Row number -> what is scored; of all rows together no more than `scores_per_step`."""


@dataclass(slots=True, frozen=True)
class TokenLogprobs:
    """Log-softmax in fp32 of the model's own logits (before penalties, bias, temperature and masks)."""

    logprob: float
    """Of the chosen token."""
    top: list[tuple[int, float]]
    """(token id, logprob) of the most likely tokens, best first; `SamplingParams.logprobs` of them."""


@dataclass(slots=True, frozen=True)
class ScoredToken:
    """Log-softmax in fp32 of the model's own logits before a known token."""

    logprob: float
    """Of the token."""
    rank: int
    """1 = none was more likely."""
    top: list[tuple[int, float]]
    """(token id, logprob) of the most likely tokens, best first; `Score.top` of them."""


@dataclass(slots=True)
class StepOutput:
    """What a step gave, row by row of its `StepInput`."""

    token_ids: list[int]
    """The sampled id; -1 for a row with `sample=False`."""
    finite: list[bool]
    """False where a row's logits hold NaN, or +inf, or nothing but -inf: the row must end with an error."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Row number -> logprobs, for rows that asked."""
    scored: dict[int, list[ScoredToken]] = field(default_factory=dict)
    """Row number -> one per target of `StepInput.scores`."""
    errors: dict[int, str] = field(default_factory=dict)
    """Row number -> why its edit failed, one sentence for the client: the row must end with it."""
    computed_slots: int = 0
    """Token places the forward computed, pads and bucket rounding included: padding_ratio = 1 - real / computed."""
    host_gap_seconds: float = 0.0
    """How long the device stood idle between the end of the step before and the start of this one; 0 if that step had
    been read before this one was launched."""
    seconds: float = 0.0
    """How long the device computed it; 0 = it has no clock, and whoever waits must measure."""
