"""``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter, Response

from quire.server.http.errors import ApiError
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The route: the first exporter that renders."""
    routes = APIRouter()

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        for exporter in state.engine.exporters:
            rendered = exporter.render()
            if rendered is not None:
                kind, body = rendered
                return Response(body, headers={"Content-Type": kind})
        raise ApiError(404, "no metrics exporter that can be scraped is on; start with --metrics prometheus")

    return routes
