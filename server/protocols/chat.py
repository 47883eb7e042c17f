"""POST /v1/chat/completions. Knows OpenAI's chat shape; the model's template and the generator do the rest."""

from dataclasses import replace
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field, PrivateAttr

from ropeway.server.errors import invalid
from ropeway.server.generator import Generation
from ropeway.server.json_route import JsonRoute
from ropeway.server.output_parser import CallArguments, CallStart, Content, Event, OutputFormat, Reasoning
from ropeway.server.output_reader import OutputReader
from ropeway.server.protocols.conversation import Conversation, conversation_edits, encode_conversation
from ropeway.server.protocols.openai import Chunks, Head
from ropeway.server.protocols.shared import answer_headers, generation_request, read_fields
from ropeway.server.reasoning import Effort
from ropeway.server.request import ChoiceDelta, GenerationRequest, PositionLogprobs
from ropeway.server.sampling_fields import MAX_MESSAGES, MAX_TOOLS, ObjectList, SamplingFields
from ropeway.server.services import Services
from ropeway.server.stream import EventStream, JsonAnswer, json_bytes
from ropeway.server.tool_choice import ToolChoice, read_tool_choice

MAX_VARIABLES = 100
TOOLS_HINT = "Tool calls come back as text in content: the chat template does not show their format, --tool-format may."


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
    tool_choice: Any = Field(default=None, description="none, auto, required, or an object that names a tool")
    parallel_tool_calls: bool | None = Field(default=None, description="true or false")
    reasoning_effort: Effort | None = Field(default=None, description=f"one of {', '.join(get_args(Effort))}")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description=f"an object of at most {MAX_VARIABLES} variables", max_length=MAX_VARIABLES
    )
    return_token_ids: bool | None = Field(default=None, description="true or false")
    add_generation_prompt: bool | None = Field(default=None, description="true or false")
    continue_final_message: bool | None = Field(default=None, description="true or false")

    _choice: ToolChoice = PrivateAttr(default_factory=ToolChoice)

    @property
    def choice(self) -> ToolChoice:
        """What `tool_choice` means; filled by `check`."""
        return self._choice

    def check(self) -> None:
        """What concerns two fields, or fields of which only a part is built. Raises: ApiError 400."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message needs add_generation_prompt: false.", "continue_final_message")
        for place, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise invalid(f"tools[{place}] must have a function with a name.", f"tools[{place}]")
            if not isinstance(function.get("parameters") or {}, dict):
                param = f"tools[{place}].function.parameters"
                raise invalid(f"{param} must be a JSON Schema, an object.", param)
        names = [tool["function"]["name"] for tool in self.tools or ()]
        self._choice = read_tool_choice(self.tool_choice, names)

    @property
    def rendered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model shall know of."""
        return None if self.choice.mode == "none" else self.tools or None

    @property
    def conversation(self) -> Conversation:
        """What the body says about the prompt."""
        return Conversation(
            messages=self.messages,
            tools=self.rendered_tools,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            tool_choice=self.choice,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message or False,
            reasoning_effort=self.reasoning_effort,
            template_kwargs=self.chat_template_kwargs,
            skip_special_tokens=self.skip_special_tokens is not False,
        )


def create_router(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["openai"], route_class=JsonRoute)
    schema = {"content": {"application/json": {"schema": ChatFields.model_json_schema()}}, "required": True}

    @router.post("/v1/chat/completions", openapi_extra={"requestBody": schema}, response_model=None)
    async def create_chat_completion(request: Request, body: Annotated[Any, Body()]) -> Response:
        fields = read_fields(services, ChatFields, body)
        fields.check()
        record = services.begin(request.scope, fields.choices)
        talk = fields.conversation
        prompt = await encode_conversation(services, talk)
        fields.ignore(prompt.ignored)
        record.settle(len(prompt.ids))
        logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        plan = generation_request(services, request, fields, prompt.ids, logprobs=logprobs, default_tokens="rest")
        edits = await conversation_edits(services, fields, talk, prompt, plan.max_tokens)
        plan = replace(plan, kept_special_ids=prompt.output.kept_ids, edits=(*edits, *plan.edits))
        generation = services.start(request.scope, [plan], record)
        return answer(services, fields, plan, prompt.output, generation)

    return router


def answer(
    services: Services, fields: ChatFields, plan: GenerationRequest, output: OutputFormat, generation: Generation
) -> Response:
    """The response, streamed or not."""
    head = Head.make("chatcmpl", services)
    headers = answer_headers(fields, [TOOLS_HINT] if fields.rendered_tools and output.tools is None else [])
    usage, logprobs = generation.usage, bool(fields.logprobs)
    reader = OutputReader(output, plan.skip_special_tokens, services.tokenizer, usage, services.metrics)
    if fields.stream:
        chunks = Chunks(head, "chat.completion.chunk", fields, usage)
        prompt_ids = plan.prompt_ids if fields.return_token_ids else None
        return EventStream(generation, ChatFrames(chunks, reader, logprobs, prompt_ids), headers)

    def whole(choices: list[ChoiceDelta]) -> dict[str, Any]:
        documents = [choice_object(reader, choice, logprobs) for choice in choices]
        if fields.return_token_ids:
            for document, choice in zip(documents, choices, strict=True):
                document |= {"prompt_token_ids": plan.prompt_ids, "token_ids": choice.token_ids}
        return head.document("chat.completion", documents, usage)

    return JsonAnswer(generation, whole, headers)


def choice_object(reader: OutputReader, choice: ChoiceDelta, logprobs: bool) -> dict[str, Any]:
    """A whole choice."""
    output = reader.read(choice)
    return {
        "index": choice.index,
        "message": message_object(output.events),
        "logprobs": logprobs_object(choice.logprobs) if logprobs else None,
        "finish_reason": output.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def message_object(events: list[Event]) -> dict[str, Any]:
    """OpenAI's message; thoughts under both names that clients look for."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append(call_object(event))
            arguments.append([])
        elif isinstance(event, CallArguments):
            arguments[event.index].append(event.text)
    for call, pieces in zip(calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(pieces)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    message["refusal"] = None
    if thoughts:
        message |= {"reasoning": thoughts, "reasoning_content": thoughts}
    return message | ({"tool_calls": calls} if calls else {})


def call_object(call: CallStart) -> dict[str, Any]:
    """A call whose arguments are still to come."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}


class ChatFrames:
    """The stream: per choice a chunk with its role, then deltas, then its end; see `stream.Frames`.

    Args:
        prompt_ids: go out with the role, and each delta's ids with it; None for no ids at all.
    """

    def __init__(
        self, chunks: Chunks, reader: OutputReader, logprobs: bool, prompt_ids: list[int] | None = None
    ) -> None:
        self._chunks = chunks
        self._reader = reader
        self._logprobs = logprobs
        self._prompt_ids = prompt_ids
        self._begun: set[int] = set()

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        return b"".join(data for delta in deltas for data in self._events(delta))

    def finish(self) -> bytes:
        return self._chunks.finish()

    def _events(self, delta: ChoiceDelta) -> list[bytes]:
        """The chunks of one delta; its logprobs and ids are in the first one that says something."""
        output = self._reader.read(delta)
        index = b'{"index":%d,"delta":' % delta.index
        unfinished = b',"finish_reason":null}'
        choices = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            ids = b"" if self._prompt_ids is None else b',"prompt_token_ids":' + json_bytes(self._prompt_ids)
            choices.append(index + b'{"role":"assistant","content":""},"logprobs":null' + ids + unfinished)
        nothing = b',"logprobs":null'
        tokens = self._tokens(delta) or nothing
        changes = [change for event in output.events if (change := delta_bytes(event))]
        if not changes and tokens != nothing:
            changes.append(b'{"content":""}')
        for change in changes:
            choices.append(index + change + tokens + unfinished)
            tokens = nothing
        if output.finish_reason is not None:
            end = {"finish_reason": output.finish_reason, "stop_reason": delta.stop_reason}
            choices.append(index + b'{},"logprobs":null,' + json_bytes(end)[1:])
        return [self._chunks.choice(choice) for choice in choices]

    def _tokens(self, delta: ChoiceDelta) -> bytes:
        """What was asked for of a delta's tokens; b"" if that is nothing."""
        logprobs = self._logprobs and delta.logprobs
        ids = self._prompt_ids is not None and delta.token_ids
        if not logprobs and not ids:
            return b""
        tokens = b',"logprobs":' + (json_bytes(logprobs_object(delta.logprobs)) if logprobs else b"null")
        return tokens + (b',"token_ids":' + json_bytes(delta.token_ids) if ids else b"")


def delta_bytes(event: Event) -> bytes:
    """What a chunk says of an event; b"" for the end of a call, which OpenAI's stream does not mark."""
    match event:
        case Content(text):
            return b'{"content":' + json_bytes(text) + b"}"
        case Reasoning(text):
            return json_bytes({"reasoning": text, "reasoning_content": text})
        case CallStart(index):
            return json_bytes({"tool_calls": [{"index": index, **call_object(event)}]})
        case CallArguments(index, text):
            return json_bytes({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        case _:
            return b""


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
