"""create_app(services): routes, middleware, exception handlers. Knows which router answers what, and nothing else.

Envelope    request id, access log, 500          outermost
CORS        only with --allowed-origins
Auth        only with keys
BodyLimit   408, 413, 415
routes      their errors, as all others, in the shape of the path's protocol
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ropeway import __version__
from ropeway.server import health, metrics, models, tokenize
from ropeway.server.auth import Auth
from ropeway.server.errors import ApiError
from ropeway.server.json_route import JsonRoute
from ropeway.server.keys import KeyRing
from ropeway.server.middleware import BodyLimit, Envelope, error_response
from ropeway.server.protocols import chat, completions, load_model, messages, responses, tgi
from ropeway.server.services import Services

LONGEST_PARAM = 200
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(services: Services, keys: KeyRing) -> FastAPI:
    """The application of one API worker."""
    settings = services.settings
    app = FastAPI(
        title="Ropeway",
        version=__version__,
        redirect_slashes=False,
        exception_handlers={
            ApiError: on_api_error,
            RequestValidationError: on_validation_error,
            HTTPException: on_http_exception,
        },
    )
    error_bodies: dict[str, Callable[[ApiError], Any]] = {}
    for module in (chat, completions, responses, messages, tgi, load_model, models, tokenize, health, metrics):
        router = module.create_router(services)
        error_bodies |= {route.path: route.error_body for route in router.routes if isinstance(route, JsonRoute)}
        for route in router.routes.copy():
            if isinstance(route, APIRoute) and "GET" in (route.methods or ()):  # HEAD is GET without a body, says HTTP
                router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
        app.include_router(router)
    app.add_middleware(BodyLimit, on_reject=services.metrics.rejected)  # the last one added is the outermost
    if keys:
        app.add_middleware(Auth, keys=keys, root_path=settings.root_path)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-ignored-params", "x-ropeway-hint"],
        )
    app.add_middleware(Envelope, metrics=services.metrics, root_path=settings.root_path, error_bodies=error_bodies)
    return app


async def on_api_error(request: Request, error: Exception) -> Response:
    """Our own errors."""
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The router's 404 and 405, and whatever FastAPI refuses itself."""
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_value")
    message = f"{request.method} {request.scope['path'][:LONGEST_PARAM]}: {error.detail}."
    refusal = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
    return error_response(refusal, request.scope)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """A body or parameter of the wrong type: 400, not 422; names the field, never repeats its value."""
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()), request.scope)


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The ApiError for pydantic's list of errors: the first of them."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    param = param_name(first["loc"])
    place = f"{param}: " if param else "The body: "
    return ApiError(400, f"{place}{first['msg']}.", code="invalid_value", param=param)


def param_name(location: Sequence[Any]) -> str | None:
    """("body", "messages", 0, "content") -> "messages[0].content"; None for the whole body."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.lstrip(".")[:LONGEST_PARAM] or None
