"""Choices of /v1/completions in OpenAI's shape, whole or in pieces, with the prompt where it is asked for.

Knows OpenAI's and vLLM's names; no field's legal values, no route.
"""

from dataclasses import dataclass
from typing import Any

from ropeway.server.protocols.openai import end_fields
from ropeway.server.request import ChoiceDelta, GenerationRequest, PositionLogprobs
from ropeway.server.token_positions import prompt_logprobs_object, token_name
from ropeway.server.tokenizer import TextTokenizer


@dataclass(slots=True, frozen=True)
class Asked:
    """What a request wants beside its text."""

    echo: bool = False
    """The prompt, before the text and in the logprobs."""
    logprobs: int | None = None
    """Most likely tokens at each place; None for no logprobs."""
    prompt_logprobs: int | None = None
    """The same in vLLM's list of the prompt's tokens."""
    token_ids: bool = False


class Choices:
    """One answer's choices."""

    def __init__(self, tokenizer: TextTokenizer, asked: Asked, plans: list[GenerationRequest]) -> None:
        self._tokenizer = tokenizer
        self._asked = asked
        self._plans = plans
        texts = [tokenizer.decode(p.prompt_ids, skip_special_tokens=p.skip_special_tokens) for p in plans]
        self._echoes = texts if asked.echo else [""] * len(plans)

    def says_more(self, choice: ChoiceDelta) -> bool:
        """Whether a piece without text and end has something else that was asked for."""
        asked = self._asked
        return bool((asked.logprobs is not None and choice.logprobs) or (asked.token_ids and choice.token_ids))

    def document(self, choice: ChoiceDelta, first: bool) -> dict[str, Any]:
        """A choice or a piece of it; the first piece has the prompt, if asked for."""
        asked, place = self._asked, choice.index // self._plans[0].n
        document = {
            "index": choice.index,
            "text": (self._echoes[place] if first else "") + choice.text,
            "logprobs": None if asked.logprobs is None else self._logprobs(choice, place, first),
            **end_fields(choice),
        }
        if asked.token_ids:
            document["token_ids"] = choice.token_ids
        if first and asked.token_ids:
            document["prompt_token_ids"] = self._plans[place].prompt_ids
        if first and asked.prompt_logprobs is not None:
            document["prompt_logprobs"] = prompt_logprobs_object(choice.prompt_logprobs, asked.prompt_logprobs)
        return document

    def _logprobs(self, choice: ChoiceDelta, place: int, first: bool) -> dict[str, list[Any]]:
        """OpenAI's four lists. With echo they begin with the prompt, whose first token has no logprob."""
        top = self._asked.logprobs or 0
        lists = logprobs_object(choice.logprobs, top, len(self._echoes[place]))
        if not (first and self._asked.echo):
            return lists
        plan = self._plans[place]
        token = plan.prompt_ids[0]
        name = token_name(token) if plan.tokens_as_ids else self._tokenizer.token_text(token)
        start: dict[str, list[Any]] = {
            "tokens": [name],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        prompt = logprobs_object(choice.prompt_logprobs, top)
        return {key: start[key] + prompt[key] + values for key, values in lists.items()}


def logprobs_object(positions: list[PositionLogprobs], top: int, shift: int = 0) -> dict[str, list[Any]]:
    """OpenAI's four lists. The chosen token is always among the top ones, so there may be one more than asked for.

    shift: characters before the text that the positions' offsets count from."""
    return {
        "tokens": [position.token for position in positions],
        "token_logprobs": [position.logprob for position in positions],
        "top_logprobs": [
            {token: logprob for _, token, _, logprob in reversed(position.top[:top])}
            | {position.token: position.logprob}
            for position in positions
        ],
        "text_offset": [shift + position.text_offset for position in positions],
    }
