"""Logprobs of tokens, from the engine's ids and numbers to what protocols show. Knows text per token; no protocol."""

import math
from collections.abc import Sequence

from ropeway.kernels.step import ScoredToken, TokenLogprobs
from ropeway.server.detokenizer import Detokenizer
from ropeway.server.request import GenerationRequest, PositionLogprobs
from ropeway.server.tokenizer import TextTokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for -inf, which JSON cannot say."""


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return logprob if math.isfinite(logprob) and logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class Positions:
    """Makes the positions of one request's tokens."""

    __slots__ = ("_as_ids", "_tokenizer")

    def __init__(self, request: GenerationRequest, tokenizer: TextTokenizer) -> None:
        self._as_ids = request.tokens_as_ids
        self._tokenizer = tokenizer

    def position(
        self, token_id: int, logprobs: TokenLogprobs | ScoredToken, offset: int, rank: int = 0
    ) -> PositionLogprobs:
        """One token's; `offset`: characters of text before it."""
        text, data = self._text, self._tokenizer.token_bytes
        top = [(id, text(id), data(id), finite(logprob)) for id, logprob in logprobs.top]
        own = finite(logprobs.logprob)
        return PositionLogprobs(token_id, text(token_id), data(token_id), own, top, offset, rank)

    def _text(self, token_id: int) -> str:
        return token_name(token_id) if self._as_ids else self._tokenizer.token_text(token_id)


class PromptPositions:
    """A prompt's positions, as their logprobs come in: one for each token but the first."""

    __slots__ = ("_detokenizer", "_offset", "_prompt_ids", "_text", "positions")

    def __init__(self, request: GenerationRequest, tokenizer: TextTokenizer) -> None:
        self._text = Positions(request, tokenizer)
        self._prompt_ids = request.prompt_ids
        self._detokenizer = Detokenizer(tokenizer, [], request.skip_special_tokens)
        self._offset = len(self._detokenizer.step(request.prompt_ids[0]))
        self.positions: list[PositionLogprobs] = []

    def take(self, scored: Sequence[ScoredToken]) -> None:
        """Adds the next tokens'."""
        for token in scored:
            token_id = self._prompt_ids[len(self.positions) + 1]
            self.positions.append(self._text.position(token_id, token, self._offset, token.rank))
            self._offset += len(self._detokenizer.step(token_id))


def token_name(token_id: int) -> str:
    """A token by its id, as vLLM writes it where `return_tokens_as_token_ids` is asked for."""
    return f"token_id:{token_id}"


def prompt_logprobs_object(
    positions: Sequence[PositionLogprobs], top: int
) -> list[dict[str, dict[str, float | int | str]] | None]:
    """vLLM's list: null for the first token, then by id the prompt's own token and the `top` most likely ones."""
    return [None, *(_by_id(position, top) for position in positions)]


def _by_id(position: PositionLogprobs, top: int) -> dict[str, dict[str, float | int | str]]:
    tokens = {str(position.token_id): _token(position.logprob, position.rank, position.token)}
    for rank, (token_id, text, _, logprob) in enumerate(position.top[:top], 1):
        if token_id != position.token_id:
            tokens[str(token_id)] = _token(logprob, rank, text)
    return tokens


def _token(logprob: float, rank: int, text: str) -> dict[str, float | int | str]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}
