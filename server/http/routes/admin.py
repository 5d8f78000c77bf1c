"""Routes below ``/admin``, which exist only with ``--admin-api-key``: the policy, and why a request waited."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from quire.core.errors import InvalidRequestError, PluginError, PluginOptionError
from quire.server.http.errors import ApiError
from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.admin import PolicyBody
from quire.server.http.protocol.reading import read_body
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/admin")

    @routes.get("/policy", openapi_extra=describe_operation("get_policy", None, errors=(401, 503)))
    async def get_policy() -> dict[str, Any]:
        """The scheduling policy, its options, and how often it was switched."""
        policy: dict[str, Any] = await state.engine.call_control("get_policy")
        return policy

    @routes.post(
        "/policy",
        openapi_extra=describe_operation("set_policy", None, body=PolicyBody, errors=(400, 401, 413, 415, 503)),
    )
    async def set_policy(request: Request) -> dict[str, Any]:
        """Switch the scheduling policy or its options. Requests in the engine stay, and are ranked anew."""
        body = await read_body(request, PolicyBody, state)
        options = {name: _to_text(value) for name, value in body.options.items()}
        try:
            return await state.engine.set_policy(body.name, options)
        except (PluginError, InvalidRequestError) as error:  # the latter is what the engine core found
            is_option = isinstance(error, PluginOptionError) or getattr(error, "param", None) == "options"
            param = "options" if is_option else "name"
            raise ApiError(400, " ".join(str(error).split()), param=param, code="invalid_value") from None

    @routes.get(
        "/requests/{request_id}",
        openapi_extra=describe_operation("explain_request", None, errors=(401, 404, 503)),
    )
    async def explain_request(request_id: str) -> dict[str, Any]:
        """Why a request waited, for each of its completions, the newest first."""
        requests = await state.engine.call_control("explain_requests", {"request_id": request_id})
        if not requests:
            message = f"no request {request_id[:200]!r} is among the last 10,000; give the X-Request-Id of its answer"
            raise ApiError(404, message, param="request_id")
        return {"requests": requests}

    return routes


def _to_text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
