"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.answers import ModelCard, ModelList
from quire.server.http.protocol.responses import current_timestamp
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    created = current_timestamp()

    def describe_model(name: str) -> dict[str, Any]:
        model = state.engine.config.model
        adapter = state.engine.adapters.find_adapter(name)
        card = {"id": name, "object": "model", "created": created, "owned_by": "quire"}
        card["root"] = model.model if adapter is None else adapter.path
        card["parent"] = None if adapter is None else adapter.parent or state.model_names[0]
        return {**card, "max_model_len": model.max_model_len}

    @routes.get("/v1/models", openapi_extra=describe_operation("list_models", ModelList))
    async def list_models() -> dict[str, Any]:
        """The names by which requests may call the model, and its adapters."""
        adapters = [ref.name for ref in state.engine.adapters.list_adapters()]
        return {"object": "list", "data": [describe_model(name) for name in (*state.model_names, *adapters)]}

    @routes.get("/v1/models/{name:path}", openapi_extra=describe_operation("get_model", ModelCard, errors=(404,)))
    async def get_model(name: str) -> dict[str, Any]:
        """One of them; ``/v1/models/`` is all of them."""
        return describe_model(state.check_model(name)) if name else await list_models()

    return routes
