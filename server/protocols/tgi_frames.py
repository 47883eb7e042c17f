"""Answers in Text Generation Inference's shapes: one document, or one event per token. Knows no field and no route."""

from typing import Any

from ropeway.server.request import ChoiceDelta, GenerationRequest, PositionLogprobs
from ropeway.server.stream import event
from ropeway.server.tokenizer import TextTokenizer


class Frames:
    """One answer's documents or events; see `stream.Frames`.

    Args:
        plan: what was asked of the engine.
        echo: text that goes before the answer's own.
        top: most likely tokens per position.
        details: whether a whole answer has them; a stream always does.
    """

    def __init__(
        self, tokenizer: TextTokenizer, plan: GenerationRequest, *, echo: str = "", top: int = 0, details: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._with_top = top > 0
        self._with_details = details
        self._text = echo
        self._pending = ""
        self._last: PositionLogprobs | None = None
        self._sent = 0
        self._count = 0

    def document(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """A whole answer: the best of the choices, by mean logprob as in TGI."""
        best = max(choices, key=mean_logprob) if len(choices) > 1 else choices[0]
        document: dict[str, Any] = {"generated_text": self._text + best.text}
        if self._with_details:
            document["details"] = self._details(best)
            if len(choices) > 1:
                others = [choice for choice in choices if choice is not best]
                document["details"]["best_of_sequences"] = [
                    self._details(choice) | {"generated_text": self._text + choice.text} for choice in others
                ]
        return document

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        return b"".join(event(document) for delta in deltas for document in self._events(delta))

    def finish(self) -> bytes:
        return b""

    def _events(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """One per token, with the text that it made ready."""
        self._text += delta.text
        self._pending += delta.text
        documents: list[dict[str, Any]] = []
        if delta.logprobs:
            tokens = self._tokens(self._pending, delta.logprobs, self._sent)
            self._sent += len(self._pending)
            self._pending = ""
            for position, token in zip(delta.logprobs, tokens, strict=True):
                self._count += 1
                document = {"index": self._count, "token": token, "generated_text": None, "details": None}
                documents.append(document | self._top([position], one=True))
            self._last = delta.logprobs[-1]
        if delta.finish_reason is not None and not documents and self._last is not None:
            # The time was over between two tokens: the last one says it again, with the text that was held back.
            token = self._token(self._last.token_id, self._pending, self._last.logprob)
            documents.append({"index": self._count, "token": token})
        if delta.finish_reason is not None and documents:
            documents[-1] |= {"generated_text": self._text, "details": self._end(delta, self._count)}
            documents[-1]["details"]["input_length"] = len(self._plan.prompt_ids)
        return documents

    def _details(self, choice: ChoiceDelta) -> dict[str, Any]:
        tokens = self._tokens(choice.text, choice.logprobs, 0)
        details = {**self._end(choice, len(choice.token_ids)), "prefill": self._prefill(choice), "tokens": tokens}
        return details | self._top(choice.logprobs)

    def _prefill(self, choice: ChoiceDelta) -> list[dict[str, Any]]:
        """The prompt's tokens, if asked for; the first has no logprob."""
        if self._plan.sampling.prompt_logprobs is None:
            return []
        first = self._plan.prompt_ids[0]
        rest = [{"id": p.token_id, "text": p.token, "logprob": p.logprob} for p in choice.prompt_logprobs]
        return [{"id": first, "text": self._tokenizer.token_text(first), "logprob": None}, *rest]

    def _end(self, choice: ChoiceDelta, count: int) -> dict[str, Any]:
        reason = "length" if choice.finish_reason == "length" else "eos_token"
        if choice.finish_reason == "stop" and isinstance(choice.stop_reason, str):
            reason = "stop_sequence"
        seed = self._plan.sampling.seed if self._plan.sampling.temperature > 0 else None
        return {"finish_reason": reason, "generated_tokens": count, "seed": seed}

    def _tokens(self, text: str, positions: list[PositionLogprobs], start: int) -> list[dict[str, Any]]:
        """Tokens with their parts of `text`, which begins at character `start`; special ones show themselves."""
        ends = [max(position.text_offset - start, 0) for position in positions[1:]] + [len(text)]
        starts = [0, *ends[:-1]]
        return [
            self._token(p.token_id, p.token if self._tokenizer.is_special(p.token_id) else text[a:b], p.logprob)
            for p, a, b in zip(positions, starts, ends, strict=True)
        ]

    def _token(self, token_id: int, text: str, logprob: float) -> dict[str, Any]:
        return {"id": token_id, "text": text, "logprob": logprob, "special": self._tokenizer.is_special(token_id)}

    def _top(self, positions: list[PositionLogprobs], one: bool = False) -> dict[str, Any]:
        if not self._with_top:
            return {}
        lists = [[self._token(id, text, logprob) for id, text, _, logprob in position.top] for position in positions]
        return {"top_tokens": lists[0] if one else lists}


def mean_logprob(choice: ChoiceDelta) -> float:
    """What TGI ranks sequences by."""
    return sum(position.logprob for position in choice.logprobs) / max(len(choice.logprobs), 1)
