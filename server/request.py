"""The one form in which every protocol's request ends, and what comes back. Knows no protocol and no engine."""

from dataclasses import dataclass, field

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.messages import EditSpec


@dataclass(slots=True, frozen=True)
class GenerationRequest:
    """One prompt and what to do with it; all values validated. Filled by a protocol, run by `Generator`."""

    prompt_ids: list[int]
    sampling: SamplingParams
    """Its `stop_token_ids` hold EOS too, unless the client ignores EOS."""
    max_tokens: int
    """0: nothing of what is generated is wanted, only the prompt's logprobs."""
    n: int = 1
    """Choices; choice i samples with seed + i. Choices are numbered from `first_index`."""
    first_index: int = 0
    stop: tuple[str, ...] = ()
    """Stop strings; the text ends before the first that appears."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    kept_special_ids: frozenset[int] = frozenset()
    """Special tokens that are text even so: what marks tool calls and thoughts, for whoever parses the output."""
    key_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    deadline: float | None = None
    """`time.monotonic()` seconds; queue time counts."""
    max_time: float | None = None
    """Seconds after which no more tokens are wanted; what is there by then, one token at least, is the answer."""
    tokens_as_ids: bool = False
    """Whether logprobs name tokens by their ids."""
    edits: tuple[EditSpec, ...] = ()
    """What changes scores between forward and sampler, in this order; each choice has its own."""


@dataclass(slots=True)
class PositionLogprobs:
    """Logprobs of one token, with the token's own text and bytes, ready for any protocol."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    top: list[tuple[int, str, bytes, float]]
    """(id, text, bytes, logprob), best first."""
    text_offset: int
    """Characters of the choice's or the prompt's text before this token."""
    rank: int = 0
    """Of a prompt's token: 1 = none was more likely."""


@dataclass(slots=True)
class ChoiceDelta:
    """What one choice gained since the last delta. The last one of a choice has a `finish_reason`."""

    index: int
    text: str = ""
    """Whole characters that no stop string can take back."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens counted in usage since the last delta, whether their text is out or still held back."""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """With the first delta of a choice, if asked for: of the prompt's tokens, all but the first."""
    finish_reason: str | None = None
    """One of OpenAI's: stop, length."""
    stop_reason: int | str | None = None
    """What ended it: the stop string, the stop token's id, a stopping criterion's name or "max_time"; None for EOS and
    the token limit."""
    cached_tokens: int = 0
    """With the first delta of a choice: prompt tokens that the prefix cache held."""
    score: float | None = None
    """Of a beam search, with the last delta: log-probability / length ** length_penalty."""
