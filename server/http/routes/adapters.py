"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, which exist with ``--enable-lora`` and
``--admin-api-key``."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from quire.core.errors import CheckpointError
from quire.server.http.errors import ApiError
from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.admin import LoadAdapterBody, UnloadAdapterBody
from quire.server.http.protocol.reading import read_body
from quire.server.http.state import ServerState

__all__ = ["make_router"]

_ERRORS = (400, 401, 403, 404, 413, 415, 503)


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post(
        "/v1/load_lora_adapter",
        response_model=None,
        openapi_extra=describe_operation("load_lora_adapter", None, body=LoadAdapterBody, errors=_ERRORS),
    )
    async def load_lora_adapter(request: Request) -> Response:
        """Load an adapter from a folder below ``--lora-root``; answered once requests can name it as their model."""
        body = await read_body(request, LoadAdapterBody, state)
        folder = _find_folder(state.settings.lora_root, body.lora_path)
        inplace = bool(body.load_inplace)
        try:
            await state.engine.adapters.load_adapter(body.lora_name, str(folder), load_inplace=inplace)
        except CheckpointError as error:
            raise ApiError(400, " ".join(str(error).split()), param="lora_path", code="invalid_value") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post(
        "/v1/unload_lora_adapter",
        response_model=None,
        openapi_extra=describe_operation("unload_lora_adapter", None, body=UnloadAdapterBody, errors=_ERRORS),
    )
    async def unload_lora_adapter(request: Request) -> Response:
        """Take an adapter's name away. Requests that use it end as they would have; then its memory is free."""
        body = await read_body(request, UnloadAdapterBody, state)
        if state.engine.adapters.find_adapter(body.lora_name) is None:
            message = f"no adapter is called {body.lora_name[:200]!r}"
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        await state.engine.adapters.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _find_folder(root: str | None, path: str) -> Path:
    """The folder ``path``, which is relative to ``root`` or absolute. Raises ``ApiError`` if it, or a file of the
    adapter in it, lies elsewhere once links are followed."""
    if root is None:
        raise ApiError(
            403, "lora_path: start the server with --lora-root DIR, below which adapters are", param="lora_path"
        )
    base = Path(root).resolve()
    try:
        folder = (base / path).resolve()
        files = [each.resolve() for each in folder.glob("adapter_*")] if folder.is_relative_to(base) else []
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        raise ApiError(400, f"lora_path: {path[:200]!r} is not a folder below --lora-root", param="lora_path") from None
    if folder.is_relative_to(base) and not folder.is_dir():
        raise ApiError(400, f"lora_path: {path[:200]!r} is not a folder below --lora-root", param="lora_path")
    if not all(each.is_relative_to(base) for each in (folder, *files)):
        raise ApiError(
            403, f"lora_path: {path[:200]!r} is not below --lora-root, or links out of it", param="lora_path"
        )
    return folder
