"""The door, as ASGI middleware: with keys configured, every route but health wants one. Knows no key itself."""

from starlette.types import ASGIApp, Receive, Scope, Send

from ropeway.server.errors import ApiError
from ropeway.server.health import HEALTH_PATHS
from ropeway.server.keys import KeyRing
from ropeway.server.middleware import error_response


class Auth:
    """ASGI middleware: 401 without a key, `key_id` in the scope's state with one.

    The key comes as `Authorization: Bearer KEY`, or as `x-api-key: KEY` from Anthropic's clients.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, root_path: str = "") -> None:
        self._app = app
        self._keys = keys
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets health and callers with a key through. The path is the router's own, never built from Host."""
        if scope["type"] != "http" or scope["path"].removeprefix(self._root_path) in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        headers = headers or [b"Bearer " + value for name, value in scope["headers"] if name == b"x-api-key"]
        key_id = self._keys.key_id(headers[0].decode("latin-1")) if len(headers) == 1 else None
        if key_id is None:
            given = "is not valid" if headers else "is missing"
            error = ApiError(
                401,
                f"The API key {given}; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error, scope)(scope, receive, send)
            return
        scope["state"]["key_id"] = key_id
        await self._app(scope, receive, send)
