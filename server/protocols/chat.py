"""POST /v1/chat/completions. Knows OpenAI's chat shape; the model's template and the generator do the rest."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from ropeway.server.chat_template import missing_template
from ropeway.server.errors import ApiError, invalid
from ropeway.server.generator import Generation, Usage
from ropeway.server.json_route import JsonRoute
from ropeway.server.protocols.openai import Chunks, Head, end_fields
from ropeway.server.protocols.shared import answer_headers, check_could_fit, generation_request, read_fields
from ropeway.server.request import ChoiceDelta, PositionLogprobs
from ropeway.server.sampling_fields import MAX_MESSAGES, MAX_TOOLS, ObjectList, SamplingFields
from ropeway.server.services import Services
from ropeway.server.stream import EventStream, JsonAnswer, json_bytes
from ropeway.server.tokenizer import INLINE_CHARS

TOOLS_HINT = "Tool calls come back as text in content: this server does not parse them yet."


class ChatFields(SamplingFields):
    """The body."""

    messages: ObjectList = Field(
        description=f"a list of 1 to {MAX_MESSAGES} messages, each with role and content",
        min_length=1,
        max_length=MAX_MESSAGES,
    )
    logprobs: bool | None = Field(default=None, description="true or false")
    top_logprobs: int | None = Field(default=None, description="an integer of at least 0", ge=0)
    tools: ObjectList | None = Field(
        default=None, description=f"a list of at most {MAX_TOOLS} tools", max_length=MAX_TOOLS
    )
    tool_choice: Any = Field(default=None, description="none or auto")
    add_generation_prompt: bool | None = Field(default=None, description="true or false")
    continue_final_message: bool | None = Field(default=None, description="true or false")

    def check(self) -> None:
        """What concerns two fields, or fields of which only a part is built. Raises: ApiError 400."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message needs add_generation_prompt: false.", "continue_final_message")
        if self.tool_choice not in (None, "none", "auto"):
            message = "tool_choice must be none or auto; required and named tools are not supported by this server yet."
            raise invalid(message, "tool_choice", "unsupported_parameter")
        for place, tool in enumerate(self.tools or ()):
            if not isinstance(tool.get("function"), dict) or not isinstance(tool["function"].get("name"), str):
                raise invalid(f"tools[{place}] must have a function with a name.", f"tools[{place}]")

    @property
    def rendered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model shall know of."""
        return None if self.tool_choice == "none" else self.tools or None


def create_router(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["openai"], route_class=JsonRoute)
    schema = {"content": {"application/json": {"schema": ChatFields.model_json_schema()}}, "required": True}

    @router.post("/v1/chat/completions", openapi_extra={"requestBody": schema}, response_model=None)
    async def create_chat_completion(request: Request, body: Annotated[Any, Body()]) -> Response:
        fields = read_fields(services, ChatFields, body)
        fields.check()
        record = services.begin(request.scope, fields.choices)
        try:
            prompt_ids = await encode_messages(services, fields)
            record.settle(len(prompt_ids))
            logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
            plan = generation_request(services, request, fields, prompt_ids, logprobs=logprobs, default_tokens="rest")
            generation = services.generator.start([plan], record)
        except BaseException as error:
            record.finish("rejected" if isinstance(error, ApiError) and error.status < 500 else "error")
            raise
        return answer(services, fields, generation)

    return router


def characters(message: dict[str, Any]) -> int:
    """Length of a message's text, in parts or in one piece."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))


async def encode_messages(services: Services, fields: ChatFields) -> list[int]:
    """Ids of the prompt; a long conversation is rendered in a thread. Raises: ApiError 400."""
    tokenizer = services.tokenizer
    template = tokenizer.chat_template
    if template is None:
        raise missing_template()
    tools = fields.rendered_tools
    if tools and not template.renders_tools:
        raise invalid("This model's chat template knows no tools.", "tools", "unsupported_parameter")

    def render() -> list[str]:
        return template.render(
            fields.messages,
            tools=tools,
            add_generation_prompt=fields.add_generation_prompt is not False and not fields.continue_final_message,
            continue_final_message=fields.continue_final_message or False,
        )

    size = sum(map(characters, fields.messages))
    check_could_fit(services, size, "messages")
    short = size <= INLINE_CHARS and len(fields.messages) <= 10 and not tools
    pieces = render() if short else await asyncio.to_thread(render)
    return await tokenizer.encode(pieces, add_special_tokens=False)


def answer(services: Services, fields: ChatFields, generation: Generation) -> Response:
    """The response, streamed or not."""
    head = Head.make("chatcmpl", services)
    headers = answer_headers(fields, [TOOLS_HINT] if fields.rendered_tools else [])
    usage = generation.usage
    if fields.stream:
        chunks = Chunks(head, "chat.completion.chunk", fields, usage)
        return EventStream(generation, ChatFrames(chunks, bool(fields.logprobs)), headers)
    return JsonAnswer(generation, lambda choices: whole(head, choices, usage, bool(fields.logprobs)), headers)


def whole(head: Head, choices: list[ChoiceDelta], usage: Usage, logprobs: bool) -> dict[str, Any]:
    """OpenAI's CreateChatCompletionResponse."""
    return head.document(
        "chat.completion",
        [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": logprobs_object(choice.logprobs) if logprobs else None,
                **end_fields(choice),
            }
            for choice in choices
        ],
        usage,
    )


class ChatFrames:
    """The stream: per choice a chunk with its role, then deltas, then its end; see `stream.Frames`."""

    def __init__(self, chunks: Chunks, logprobs: bool) -> None:
        self._chunks = chunks
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        return b"".join(data for delta in deltas for data in self._events(delta))

    def finish(self) -> bytes:
        return self._chunks.finish()

    def _events(self, delta: ChoiceDelta) -> list[bytes]:
        index = b'{"index":%d,"delta":' % delta.index
        unfinished = b',"finish_reason":null}'
        choices = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            choices.append(index + b'{"role":"assistant","content":""},"logprobs":null' + unfinished)
        if delta.text or (self._logprobs and delta.logprobs):
            logprobs = json_bytes(logprobs_object(delta.logprobs)) if self._logprobs else b"null"
            choices.append(index + b'{"content":' + json_bytes(delta.text) + b'},"logprobs":' + logprobs + unfinished)
        if delta.finish_reason is not None:
            choices.append(index + b'{},"logprobs":null,' + json_bytes(end_fields(delta))[1:])
        return [self._chunks.choice(choice) for choice in choices]


def logprobs_object(positions: list[PositionLogprobs]) -> dict[str, Any]:
    """OpenAI's logprobs of a choice."""
    content = [
        {
            "token": position.token,
            "logprob": position.logprob,
            "bytes": list(position.token_bytes),
            "top_logprobs": [
                {"token": token, "logprob": logprob, "bytes": list(data)} for _, token, data, logprob in position.top
            ],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}
