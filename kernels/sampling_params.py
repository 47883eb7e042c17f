"""Per-row sampling parameters: the one description that HTTP, scheduler and sampler share.

Plain Python, nothing heavy. Values are validated before they get here (`server/`); the sampler trusts them.
"""

from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How the next token of a row is chosen.

    The order is that of transformers: bias, penalties and bans, then temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 = off.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 = off.
        min_p: keep tokens with at least min_p times the probability of the most likely one; 0 = off.
        repetition_penalty: as in transformers, over prompt and output; 1 = off.
        frequency_penalty: OpenAI's, times the count in the output; 0 = off.
        presence_penalty: OpenAI's, once if the token is in the output; 0 = off.
        logit_bias: token id -> value added to its logit (-100 and less bans it).
        allowed_token_ids: if not empty, every other token is banned.
        stop_token_ids: a row ends with one of these (EOS included, unless the client ignores it).
        min_tokens: until so many tokens are generated, `stop_token_ids` are banned.
        seed: int64; with the token's position it alone decides the noise.
        logprobs: number of most likely tokens to report per position; 0 = only the chosen one; None = none.
        prompt_logprobs: the same for the tokens of the prompt; once per request, whatever its choices.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def wrap_seed(seed: int) -> int:
    """The int64 that a seed means: `seed + i` of a late choice wraps."""
    return (seed + 2**63) % 2**64 - 2**63
