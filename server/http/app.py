"""The FastAPI application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware

from quire.core.version import __version__
from quire.server.http.errors import add_error_handlers
from quire.server.http.middleware import RequestMiddleware
from quire.server.http.openapi import describe_app
from quire.server.http.routes import (
    adapters,
    admin,
    chat,
    completions,
    health,
    invocations,
    metrics,
    models,
    responses,
    tokens,
    trace,
    unsupported,
)
from quire.server.http.settings import ServerSettings
from quire.server.http.state import ServerState

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM

__all__ = ["create_app", "create_metrics_app"]


def create_app(engine: AsyncLLM, settings: ServerSettings | None = None, arguments: Any = None) -> FastAPI:
    """An application over a started engine. ``app.state.server`` is its ``ServerState``."""
    settings = settings or ServerSettings()
    state = ServerState(engine, settings, arguments)
    app = FastAPI(
        title="Quire",
        version=__version__,
        middleware=[*_cors_middleware(settings), Middleware(RequestMiddleware, state=state)],
    )
    app.state.server = state
    if settings.admin_api_key is not None and engine.adapters.is_on:
        app.include_router(adapters.make_router(state))
    for module in (chat, completions, responses, invocations, models, tokens, health, metrics, trace, unsupported):
        app.include_router(module.make_router(state))
    if settings.admin_api_key is not None:
        app.include_router(admin.make_router(state))
    add_error_handlers(app)
    describe_app(app, has_api_keys=bool(state.api_keys))
    return app


def create_metrics_app(state: ServerState) -> FastAPI:
    """An application that serves only ``/metrics``, for ``--prometheus-port``."""
    app = FastAPI(title="Quire metrics", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(metrics.make_router(state))
    add_error_handlers(app)
    return app


def _cors_middleware(settings: ServerSettings) -> list[Middleware]:
    """What answers the preflight requests of browsers, which carry no API key, before anything else sees them."""
    if not settings.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    ]
