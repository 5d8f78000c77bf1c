"""``/trace``: the engine's last steps."""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import APIRouter, Query

from quire.core.stats import TRACED_STEPS
from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.answers import StepTrace
from quire.server.http.state import ServerState
from quire.server.http.trace import make_chrome_trace

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The route. Steps are always traced; asking costs nothing until now."""
    routes = APIRouter()

    @routes.get("/trace", openapi_extra=describe_operation("trace", StepTrace, errors=(400,)))
    async def trace(steps: int = Query(TRACED_STEPS, ge=1, le=TRACED_STEPS)) -> dict[str, Any]:
        """The last ``steps`` steps, for ui.perfetto.dev."""
        kept = state.engine.steps
        return make_chrome_trace(islice(kept, max(len(kept) - steps, 0), None))

    return routes
