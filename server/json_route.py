"""Strict JSON for every route with a body: `APIRouter(route_class=JsonRoute)`. Knows no fields.

The standard library's parser takes NaN, lone surrogates and nesting until the stack ends; a valid-looking body must
never become a 500, so bodies are parsed by pydantic's parser, which has limits for all of these.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from ropeway.server.errors import ApiError

UNANSWERED = "unanswered"
"""In the scope's state: what ends the generation of a request that has no answer yet, `end(outcome)`."""


class JsonRequest(Request):
    """A request whose `json()` refuses NaN, Infinity, lone surrogates, deep nesting and endless integers."""

    async def json(self) -> Any:
        """The parsed body. Raises: json.JSONDecodeError, which FastAPI turns into a validation error."""
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False, cache_strings="none")
            except ValueError as error:
                raise json.JSONDecodeError(str(error), "", 0) from None
        return self._json


class JsonRoute(APIRoute):
    """A route that hands its endpoint a `JsonRequest`, and knows what its protocol's errors look like."""

    def error_body(self, error: ApiError) -> Any:
        """The JSON document of an error; OpenAI's shape, unless a protocol has its own."""
        return error.body()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with the request's class changed; what fails leaves nothing running."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handler(JsonRequest(request.scope, request.receive))
            except BaseException as error:
                if end := request.scope.get("state", {}).get(UNANSWERED):
                    end("rejected" if isinstance(error, ApiError) and error.status < 500 else "error")
                raise

        return strict
