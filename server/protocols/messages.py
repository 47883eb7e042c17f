"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's shape. Knows its names; a conversation comes out."""

import json
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from ropeway.server.errors import ApiError, invalid
from ropeway.server.json_route import JsonRoute
from ropeway.server.protocols.conversation import Conversation, encode_conversation
from ropeway.server.protocols.dialogue import converse, joined_text
from ropeway.server.protocols.messages_frames import Frames, error_body, error_event
from ropeway.server.protocols.shared import answer_headers, read_fields
from ropeway.server.reasoning import Effort
from ropeway.server.request import ChoiceDelta
from ropeway.server.sampling_fields import MAX_MESSAGES, MAX_TOOLS, STOP, ObjectList, SamplingFields, StopTexts
from ropeway.server.services import Services
from ropeway.server.stream import EventStream, JsonAnswer
from ropeway.server.tool_choice import ToolChoice, check_strict, read_tool_choice


class MessagesFields(SamplingFields):
    """The body."""

    messages: ObjectList = Field(
        description=f"a list of 1 to {MAX_MESSAGES} messages, each with role and content",
        min_length=1,
        max_length=MAX_MESSAGES,
    )
    system: str | ObjectList | None = Field(default=None, description="a string or a list of text parts")
    stop_sequences: StopTexts = Field(default=None, description=STOP)
    temperature: float | None = Field(default=None, description="a number from 0 (greedy) to 1", ge=0, le=1)
    tools: ObjectList | None = Field(
        default=None, description=f"a list of at most {MAX_TOOLS} tools", max_length=MAX_TOOLS
    )
    tool_choice: dict[str, Any] | None = Field(default=None, description="an object with a type")
    thinking: dict[str, Any] | None = Field(default=None, description="an object with a type")

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        given = self.stop_sequences
        return (*((given,) if isinstance(given, str) else given or ()), *super().stops)

    @property
    def effort(self) -> Effort | None:
        """What `thinking` asks for. Raises: ApiError 400."""
        kind = self.thinking.get("type") if self.thinking else None
        if self.thinking is not None and kind not in ("enabled", "disabled", "adaptive"):
            raise invalid("thinking.type must be enabled, adaptive or disabled.", "thinking")
        return None if kind in (None, "adaptive") else "none" if kind == "disabled" else "high"

    @property
    def budget(self) -> int | None:
        """Tokens after which thoughts are ended. Raises: ApiError 400."""
        budget = (self.thinking or {}).get("budget_tokens")
        if budget is not None and (type(budget) is not int or budget < 0):
            raise invalid("thinking.budget_tokens must be an integer of at least 0.", "thinking")
        return budget

    def _choice(self, names: list[str]) -> ToolChoice:
        """What `tool_choice` means. Raises: ApiError 400."""
        given = self.tool_choice or {"type": "auto"}
        kind = given.get("type")
        if kind not in ("auto", "none", "any", "tool"):
            raise invalid("tool_choice.type must be auto, none, any or tool.", "tool_choice")
        choice = read_tool_choice({"any": "required", "tool": given | {"type": "function"}}.get(kind, kind), names)
        return replace(choice, named=False)  # here an answer that calls a tool always says so

    def conversation(self) -> Conversation:
        """Messages and tools in OpenAI's shape. Raises: ApiError 400 naming the part that is wrong."""
        messages = []
        if self.system is not None:
            messages.append({"role": "system", "content": joined_text(self.system, ("text",), "system")})
        for place, turn in enumerate(self.messages):
            messages += convert(turn, f"messages[{place}]")
        tools = [tool_object(*tool) for tool in enumerate(self.tools or ())]
        choice = self._choice([tool["function"]["name"] for tool in tools])
        return Conversation(
            messages=messages,
            tools=None if choice.mode == "none" else tools or None,
            tool_choice=choice,
            parallel_tool_calls=not (self.tool_choice or {}).get("disable_parallel_tool_use"),
            continue_final_message=messages[-1]["role"] == "assistant",
            reasoning_effort=self.effort,
            thinking_budget=self.budget,
        )


class MessagesRoute(JsonRoute):
    """Errors in Anthropic's shape."""

    def error_body(self, error: ApiError) -> Any:
        """The JSON of an error."""
        return error_body(error)


def create_router(services: Services) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["anthropic"], route_class=MessagesRoute)

    @router.post("/v1/messages", response_model=None)
    async def create_message(request: Request, body: Annotated[Any, Body()]) -> Response:
        fields = read_fields(services, MessagesFields, body)
        if fields.max_tokens is None:
            raise invalid("max_tokens is required.", "max_tokens", "missing_required_parameter")
        renamed = {"reasoning_effort": "thinking", "thinking_budget": "thinking.budget_tokens"}
        generation, reader = await converse(services, request, fields, fields.conversation(), renamed, "messages")
        frames = Frames(services.model_name, generation.usage, reader)
        headers = answer_headers(fields, [])
        if fields.stream:
            return EventStream(generation, frames, headers, error_event)

        def whole(choices: list[ChoiceDelta]) -> dict[str, Any]:
            return frames.document(choices[0])

        return JsonAnswer(generation, whole, headers)

    @router.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(body: Annotated[Any, Body()]) -> dict[str, int]:
        fields = read_fields(services, MessagesFields, body)
        return {"input_tokens": len((await encode_conversation(services, fields.conversation())).ids)}

    return router


def convert(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message in OpenAI's shape: results of tools are messages of their own there. Raises: ApiError 400."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise invalid(f"{where}.role must be user or assistant.", f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid(f"{where}.content must be a string or a list of parts.", f"{where}.content")
    results, texts, thoughts, calls = [], [], [], []
    for place, part in enumerate(content):
        here = f"{where}.content[{place}]"
        match role, part.get("type"):
            case _, "text":
                texts.append(joined_text([part], ("text",), here))
            case "user", "tool_result":
                results.append(result_message(part, here))
            case "assistant", "tool_use":
                calls.append(call_object(part, here))
            case "assistant", "thinking" | "redacted_thinking":
                thoughts.append(str(part.get("thinking") or ""))
            case _:
                raise invalid(f"{here}.type is not one that this model takes from a {role}.", here)
    if results and not (texts or calls or thoughts):
        return results
    said: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if thoughts:
        said["reasoning_content"] = "".join(thoughts)
    return [*results, said | ({"tool_calls": calls} if calls else {})]


def result_message(part: dict[str, Any], where: str) -> dict[str, Any]:
    """What a tool said."""
    content = part.get("content")
    text = "" if content is None else joined_text(content, ("text",), f"{where}.content")
    return {"role": "tool", "tool_call_id": str(part.get("tool_use_id") or ""), "content": text}


def call_object(part: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call of an earlier turn."""
    if not isinstance(part.get("name"), str) or not isinstance(part.get("input"), dict):
        raise invalid(f"{where} must have a name and an input object.", where)
    function = {"name": part["name"], "arguments": json.dumps(part["input"])}
    return {"id": str(part.get("id") or ""), "type": "function", "function": function}


def tool_object(place: int, tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's shape. Raises: ApiError 400 for tools that Anthropic's own servers run."""
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
        raise invalid(f"tools[{place}] must have a name and an input_schema.", f"tools[{place}]")
    check_strict(tool, f"tools[{place}]")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("strict"):
        function["strict"] = True
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}
