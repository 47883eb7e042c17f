"""Errors as clients see them: one exception class, one JSON shape. Knows HTTP statuses, not how they are sent."""

from typing import Any


class ApiError(Exception):
    """An answer other than 200. Everything that reaches a client as an error is one of these.

    Args:
        status: HTTP status.
        message: one sentence that says what is wrong and what to do.
        code: stable string of the contract ("invalid_value", "context_length_exceeded", "server_overloaded", ...).
        type: OpenAI's error class name; by default derived from the status.
        param: the request field at fault.
        headers: extra response headers, "Retry-After" for example.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON document, OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """The 400 for a request that can never succeed."""
    return ApiError(400, message, code=code, param=param)


class UsageError(Exception):
    """The command line, the environment, a file or a model is wrong: one sentence for stderr, exit code 2."""
