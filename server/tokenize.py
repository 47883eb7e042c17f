"""POST /tokenize and /detokenize, with vLLM's bodies. Knows the tokenizer; the engine is not asked."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from ropeway.server.chat_template import missing_template
from ropeway.server.errors import invalid
from ropeway.server.json_route import JsonRoute
from ropeway.server.sampling import check_ids
from ropeway.server.sampling_fields import MAX_MESSAGES, MAX_TOOLS, ObjectList, names_header
from ropeway.server.services import Services


class TokenizeBody(BaseModel):
    """Exactly one of `prompt` and `messages`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: ObjectList | None = Field(default=None, max_length=MAX_MESSAGES)
    tools: ObjectList | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """Absent: yes for a prompt, no for messages, whose template writes them."""
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """Token ids; special tokens are part of the text."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]


def create_router(services: Services) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["text"], route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody, response: Response) -> dict[str, Any]:
        info = services.require_loaded()
        services.check_model(body.model)
        note_unknown(services, body, response)
        ids = await encode(services, body)
        strings = [services.tokenizer.backend.id_to_token(id) for id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody, response: Response) -> dict[str, str]:
        info = services.require_loaded()
        services.check_model(body.model)
        note_unknown(services, body, response)
        check_ids(body.tokens, info.vocab_size, "tokens")
        return {"prompt": services.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return router


def note_unknown(services: Services, body: BaseModel, response: Response) -> None:
    """Fields nobody knows: named in a header, or 400 with --strict."""
    unknown = sorted(body.model_extra or {})
    if unknown and services.settings.strict:
        raise invalid(f"{unknown[0]} is not a field of this endpoint.", unknown[0], "unknown_parameter")
    if unknown:
        response.headers["x-ignored-params"] = names_header(unknown)


async def encode(services: Services, body: TokenizeBody) -> list[int]:
    """Ids of the prompt, or of the messages through the chat template. Raises: ApiError 400."""
    tokenizer = services.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return await tokenizer.encode([body.prompt], add_special_tokens=special)
    if tokenizer.chat_template is None:
        raise missing_template()
    pieces = await asyncio.to_thread(
        tokenizer.chat_template.render,
        body.messages or [],
        tools=body.tools or None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message or False,
    )
    return await tokenizer.encode(pieces, add_special_tokens=body.add_special_tokens or False)
