"""``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from quire.server.http.errors import ApiError
from quire.server.http.openapi import describe_operation
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The routes: every exporter that renders, and one of them alone."""
    routes = APIRouter()

    @routes.get(
        "/metrics",
        response_model=None,
        response_class=PlainTextResponse,
        openapi_extra=describe_operation("metrics", None, errors=(404,)),
    )
    async def metrics() -> Response:
        """Figures of every exporter for Prometheus, one document behind the other, and behind them those of the HTTP
        server; those of another media type than the first one's are at ``/metrics/NAME`` alone."""
        documents = await state.engine.render_metrics()
        if not documents:
            raise ApiError(404, "no metrics exporter that can be scraped is on; start without --metrics none")
        kind = documents[0].content_type
        bodies = [each.body for each in documents if _media_type(each.content_type) == _media_type(kind)]
        if _media_type(kind) == "text/plain":
            bodies.append(state.http_metrics.render())
        lines = [body if body.endswith(b"\n") or len(bodies) == 1 else body + b"\n" for body in bodies]
        return Response(b"".join(lines), headers={"Content-Type": kind})

    @routes.get(
        "/metrics/{name:path}",
        response_model=None,
        response_class=PlainTextResponse,
        openapi_extra=describe_operation("metrics_of_exporter", None, errors=(404,)),
    )
    async def metrics_of_exporter(name: str) -> Response:
        """Figures of one exporter; ``/metrics/`` is those of all."""
        if not name:
            return await metrics()
        documents = {document.name: document for document in await state.engine.render_metrics()}
        if name not in documents:
            names = ", ".join(documents) or "none"
            raise ApiError(404, f"no metrics exporter {name!r} that can be scraped is on; on are {names}")
        return Response(documents[name].body, headers={"Content-Type": documents[name].content_type})

    return routes


def _media_type(content_type: str) -> str:
    """Without its parameters, such as the version and the charset, which authors spell in many ways."""
    return content_type.partition(";")[0].strip().lower()
