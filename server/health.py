"""Three different answers about health, none of which waits for the engine. Knows the client's view of it only.

live: the process answers. startup: 503 with stage and percent until the model is loaded, then 200 for good.
ready: 200 only while tokens can come out.
"""

from fastapi import APIRouter
from starlette.responses import JSONResponse

from ropeway.server.errors import ApiError
from ropeway.server.services import UNREADY_RETRY_S, Services

LIVE = ("/health/live", "/healthz", "/livez")
READY = ("/health/ready", "/health", "/readyz")
STARTUP = ("/health/startup",)
HEALTH_PATHS = frozenset(LIVE + READY + STARTUP)
"""Open without a key."""


def create_router(services: Services) -> APIRouter:
    """Every route of HEALTH_PATHS."""
    router = APIRouter(tags=["health"])

    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    async def startup() -> JSONResponse:
        if services.loaded:
            return JSONResponse({"status": "started"})
        return unhealthy(services, "loading", "The model is loading.")

    async def ready() -> JSONResponse:
        if why := services.why_unready():
            return unhealthy(services, *why)
        return JSONResponse({"status": "ready"})

    for paths, endpoint in ((LIVE, live), (READY, ready), (STARTUP, startup)):
        for path in paths:
            router.add_api_route(path, endpoint, methods=["GET"], include_in_schema=path == paths[0])
    return router


def unhealthy(services: Services, code: str, reason: str) -> JSONResponse:
    """A 503 that balancers, people and clients can read: the error shape, and the facts beside it."""
    status = services.client.status
    facts = {"status": code, "stage": status.stage, "progress": round(status.progress, 3), "detail": status.reason}
    body = ApiError(503, reason, code=code).body() | facts
    return JSONResponse(body, 503, {"Retry-After": str(UNREADY_RETRY_S)})
