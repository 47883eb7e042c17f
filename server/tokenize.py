"""POST /tokenize and /detokenize, with vLLM's bodies. Knows the tokenizer; the engine is not asked.

They share the tokenizer's threads with prompts, so what they take is bounded: in length, and long texts in number.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from ropeway.server.chat_template import missing_template
from ropeway.server.errors import ApiError, invalid
from ropeway.server.json_route import JsonRoute
from ropeway.server.sampling import check_ids
from ropeway.server.sampling_fields import MAX_MESSAGES, MAX_TOOLS, ObjectList, names_header
from ropeway.server.services import Services
from ropeway.server.stream import json_bytes
from ropeway.server.tokenizer import INLINE_CHARS

MAX_CHARS = 2**20
"""Of a text, about a second in a tokenizer's thread."""
MAX_IDS = 2**18
MAX_LONG = 8
"""Texts that are more than `INLINE_CHARS` long at a time, in one API worker."""
LONG_RETRY_S = "1"


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
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, max_length=MAX_IDS)]


def create_router(services: Services) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["text"], route_class=JsonRoute)
    places = Places(services)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody, response: Response) -> dict[str, Any]:
        info = services.require_loaded()
        services.check_model(body.model)
        note_unknown(services, body, response)
        with places.take(text_length(body)):
            ids = await encode(services, body)
            name = services.tokenizer.backend.id_to_token
            strings = await asyncio.to_thread(list, map(name, ids)) if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody, response: Response) -> dict[str, str]:
        info = services.require_loaded()
        services.check_model(body.model)
        note_unknown(services, body, response)
        check_ids(body.tokens, info.vocab_size, "tokens")
        with places.take(len(body.tokens)):
            return {"prompt": await services.tokenizer.decode_long(body.tokens, skip_special_tokens=False)}

    return router


class Places:
    """Room for long texts. Knows how many are there; a short one needs none."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._taken = 0

    @contextlib.contextmanager
    def take(self, length: int) -> Iterator[None]:
        """Room for a text while it is worked on. Raises: ApiError 503 if there is none."""
        if length <= INLINE_CHARS:
            yield
            return
        if self._taken == MAX_LONG:
            self._services.metrics.rejected("texts")
            message = f"The server is overloaded: {MAX_LONG} long texts are worked on. Try again in {LONG_RETRY_S} s."
            raise ApiError(503, message, code="server_overloaded", headers={"Retry-After": LONG_RETRY_S})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


def text_length(body: TokenizeBody) -> int:
    """Characters of a prompt, or bytes of messages and tools as JSON. Raises: ApiError 400 if that is too many."""
    length = len(body.prompt) if body.prompt is not None else len(json_bytes([body.messages, body.tools]))
    if length > MAX_CHARS:
        field = "prompt" if body.prompt is not None else "messages"
        raise invalid(f"{field} must have at most {MAX_CHARS} characters here.", field)
    return length


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
