"""``/health``, ``/ready``, ``/ping``, ``/version`` and ``/load``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from quire.core.version import __version__
from quire.server.http.errors import UnavailableError
from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.answers import Health, Load, Version
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The routes. 503 when requests should go elsewhere: not loaded yet, draining, the engine hangs or is dead, or its
    steps fail one after the other."""
    routes = APIRouter()

    def check_ready() -> dict[str, str]:
        if state.draining:
            raise UnavailableError("the server is shutting down")
        state.check_alive()
        if not state.engine.is_ready:
            raise UnavailableError(state.engine.unavailable_reason or "the model is loading")
        if (failures := state.engine.step_health.describe_failures()) is not None:
            raise UnavailableError(failures)
        return {"status": "ok"}

    @routes.get("/health", openapi_extra=describe_operation("health", Health, errors=(503,)))
    async def health() -> dict[str, str]:
        """Whether requests can be served."""
        return check_ready()

    @routes.get("/ready", openapi_extra=describe_operation("ready", Health, errors=(503,)))
    async def ready() -> dict[str, str]:
        """The same, under the name that orchestrators ask for."""
        return check_ready()

    @routes.api_route(
        "/ping", methods=["GET", "POST"], openapi_extra=describe_operation("ping", Health, errors=(413, 503))
    )
    async def ping() -> dict[str, str]:
        """The same, under the name that SageMaker asks for."""
        return check_ready()

    @routes.get("/version", openapi_extra=describe_operation("version", Version))
    async def version() -> dict[str, str]:
        """The version of Quire."""
        return {"version": __version__}

    @routes.get("/load", openapi_extra=describe_operation("load", Load))
    async def load() -> dict[str, Any]:
        """What a load balancer wants to know."""
        stats = state.engine.get_stats()
        figures = {name: stats.get(name, 0) for name in ("num_requests_running", "num_requests_waiting")}
        return {"server_load": state.in_flight, **figures, "kv_cache_usage_perc": stats.get("kv_cache_usage_perc", 0.0)}

    return routes
