"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from quire.server.http.protocol.replies import created_now
from quire.server.http.state import ServerState

__all__ = ["router"]


def router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    created = created_now()

    def card(name: str) -> dict[str, Any]:
        model = state.engine.config.model
        card = {"id": name, "object": "model", "created": created, "owned_by": "quire", "root": model.model}
        return {**card, "parent": None, "max_model_len": model.max_model_len}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The names by which requests may call the model."""
        return {"object": "list", "data": [card(name) for name in state.model_names]}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return card(state.check_model(name))

    return routes
