"""GET /v1/models and /v1/models/{id}, and /version. Knows names and sizes, no engine call."""

from typing import Any

from fastapi import APIRouter

from ropeway import __version__
from ropeway.server.services import Services


def create_router(services: Services) -> APIRouter:
    """The served names, all of one model. Ids hold "/", which the SDKs send as %2F."""
    router = APIRouter(tags=["models"])

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": services.created,
            "owned_by": "ropeway",
            "root": services.model_name,
            "max_model_len": services.require_loaded().max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in services.settings.served_names]}

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        services.check_model(model_id or "/")
        return describe(model_id)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return router
