"""The budgets of a step, and the requests that no step could ever finish."""

from dataclasses import dataclass
from typing import Literal

from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.row import InvalidRequest, Row


class RequestTooLong(InvalidRequest):
    """The request could never be finished, not even alone."""


@dataclass(slots=True, frozen=True)
class Limits:
    """The budgets of a step and the longest row."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_cache_scope: Literal["key", "server"] = "key"
    """Who shares cached prefixes: the requests of one key, or all."""
    max_scored_tokens: int = 1024
    """Prompt tokens of a step whose logprobs are wanted."""


def check_length(row: Row, limits: Limits, pool: BlockPool) -> None:
    """Raises RequestTooLong unless the row could run alone."""
    if row.num_prompt >= limits.max_model_len:
        raise RequestTooLong(f"The prompt has {row.num_prompt} tokens, but the context ends at {limits.max_model_len}.")
    needed = pool.blocks_for(row.max_length - 1)  # the last token is never computed
    if needed > pool.num_usable:
        raise RequestTooLong(
            f"The prompt of {row.num_prompt} tokens and max_tokens need {needed} KV cache blocks "
            f"of {pool.block_size} tokens, but there are only {pool.num_usable}; ask for fewer tokens."
        )
