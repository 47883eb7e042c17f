"""POST /v1/completions. Knows OpenAI's completion shape: prompts in, text out, no template."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from ropeway.server.errors import ApiError, invalid
from ropeway.server.generator import Generation, Usage
from ropeway.server.json_route import JsonRoute
from ropeway.server.protocols.openai import (
    Chunks,
    Head,
    answer_headers,
    check_could_fit,
    end_fields,
    generation_request,
    read_fields,
)
from ropeway.server.request import ChoiceDelta, GenerationRequest, PositionLogprobs
from ropeway.server.sampling_fields import SamplingFields
from ropeway.server.services import Services
from ropeway.server.stream import EventStream, JsonAnswer, json_bytes

MAX_PROMPTS = 2048
PROMPT = "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"

Prompt = str | list[int]


class CompletionFields(SamplingFields):
    """The body."""

    prompt: Any = Field(description=PROMPT)
    logprobs: int | None = Field(default=None, description="an integer of at least 0", ge=0)

    def prompts(self) -> list[Prompt]:
        """One text or list of ids per prompt. Raises: ApiError 400."""
        given = self.prompt
        if isinstance(given, str) or _all(given, int):
            given = [given]
        if not (_all(given, str) or (_all(given, list) and all(_all(ids, int) for ids in given))) or "" in given:
            raise invalid(f"prompt must be {PROMPT}.", "prompt")
        if len(given) > MAX_PROMPTS:
            raise invalid(f"prompt must hold at most {MAX_PROMPTS} prompts.", "prompt")
        return list(given)


def _all(values: Any, kind: type) -> bool:
    """Whether it is a list, not empty, of this very type (a boolean is no integer)."""
    return isinstance(values, list) and set(map(type, values)) == {kind}


def create_router(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["openai"], route_class=JsonRoute)
    schema = {"content": {"application/json": {"schema": CompletionFields.model_json_schema()}}, "required": True}

    @router.post("/v1/completions", openapi_extra={"requestBody": schema}, response_model=None)
    async def create_completion(request: Request, body: Annotated[Any, Body()]) -> Response:
        fields = read_fields(services, CompletionFields, body)
        prompts = fields.prompts()
        record = services.begin(request.scope, fields.choices * len(prompts))
        try:
            ids = [await encode_prompt(services, prompt) for prompt in prompts]
            record.settle(sum(map(len, ids)))
            plans = [
                generation_request(
                    services,
                    request,
                    fields,
                    prompt_ids,
                    logprobs=fields.logprobs,
                    default_tokens="short",
                    first_index=place * fields.choices,
                )
                for place, prompt_ids in enumerate(ids)
            ]
            generation = services.generator.start(plans, record)
        except BaseException as error:
            record.finish("rejected" if isinstance(error, ApiError) and error.status < 500 else "error")
            raise
        return answer(services, fields, plans, generation)

    return router


async def encode_prompt(services: Services, prompt: Prompt) -> list[int]:
    """Token ids of one prompt. Raises: ApiError 400 for one that is far too long."""
    if isinstance(prompt, list):
        return prompt
    check_could_fit(services, len(prompt), "prompt")
    return await services.tokenizer.encode([prompt], add_special_tokens=True)


def answer(
    services: Services, fields: CompletionFields, plans: list[GenerationRequest], generation: Generation
) -> Response:
    """The response, streamed or not."""
    head = Head.make("cmpl", services)
    hints = []
    if fields.most_tokens(0) is None:
        most = max(plan.max_tokens for plan in plans)
        hints.append(f"max_tokens was not given: the output is cut after {most} tokens.")
    headers = answer_headers(fields, hints)
    usage, logprobs = generation.usage, fields.logprobs is not None
    if fields.stream:
        chunks = Chunks(head, "text_completion", fields, usage)
        return EventStream(generation, CompletionFrames(chunks, logprobs), headers)
    return JsonAnswer(generation, lambda choices: whole(head, choices, usage, logprobs), headers)


def whole(head: Head, choices: list[ChoiceDelta], usage: Usage, logprobs: bool) -> dict[str, Any]:
    """OpenAI's CreateCompletionResponse."""
    return head.document("text_completion", [choice_object(choice, logprobs) for choice in choices], usage)


def choice_object(choice: ChoiceDelta, logprobs: bool) -> dict[str, Any]:
    """A choice, whole or a piece of it."""
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": logprobs_object(choice.logprobs) if logprobs else None,
        **end_fields(choice),
    }


class CompletionFrames:
    """The stream: pieces of text, the last one of a choice with its end; see `stream.Frames`."""

    def __init__(self, chunks: Chunks, logprobs: bool) -> None:
        self._chunks = chunks
        self._logprobs = logprobs

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        return b"".join(self._event(delta) for delta in deltas)

    def finish(self) -> bytes:
        return self._chunks.finish()

    def _event(self, delta: ChoiceDelta) -> bytes:
        if not delta.text and delta.finish_reason is None and not (self._logprobs and delta.logprobs):
            return b""
        return self._chunks.choice(json_bytes(choice_object(delta, self._logprobs)))


def logprobs_object(positions: list[PositionLogprobs]) -> dict[str, Any]:
    """OpenAI's four lists. The chosen token is always among the top ones, so there may be one more than asked for."""
    return {
        "tokens": [position.token for position in positions],
        "token_logprobs": [position.logprob for position in positions],
        "top_logprobs": [
            {token: logprob for _, token, _, logprob in reversed(position.top)} | {position.token: position.logprob}
            for position in positions
        ],
        "text_offset": [position.text_offset for position in positions],
    }
