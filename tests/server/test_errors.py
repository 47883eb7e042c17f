"""The one shape of errors."""

from ropeway.server.errors import ApiError, invalid


def test_shape() -> None:
    """Guards SDKs: type by status, code a string or null, param the field at fault."""
    assert invalid("n is wrong.", "n").body() == {
        "error": {"message": "n is wrong.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }
    types = {status: ApiError(status, "x").type for status in (400, 401, 404, 429, 500, 503, 504)}
    assert types == {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
    assert ApiError(418, "x", type="teapot").body()["error"] | {"message": ""} == {
        "message": "",
        "type": "teapot",
        "param": None,
        "code": None,
    }
