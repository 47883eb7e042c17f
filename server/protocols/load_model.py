"""POST /load_model: what `transformers chat` asks for before its first question. The model is there already."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Response

from ropeway.server.errors import invalid
from ropeway.server.json_route import JsonRoute
from ropeway.server.services import Services
from ropeway.server.stream import STREAM_HEADERS, event


def create_router(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["transformers"], route_class=JsonRoute)

    @router.post("/load_model", response_model=None)
    async def load_model(body: Annotated[Any, Body()]) -> Response:
        model = body.get("model") if isinstance(body, dict) else None
        if not isinstance(model, str | None):
            raise invalid("model must be a string: the name of the model.", "model")
        services.check_model(model)
        services.require_ready()
        ready = {"status": "ready", "model": model or services.model_name, "cached": True}
        return Response(event(ready), headers=STREAM_HEADERS)

    return router
