"""Routes of the OpenAI API, and of vLLM's server, that Quire does not have: each says so with 400.

A gateway takes a 404 for a model that is gone and sends it no more requests; a 400 blames the request alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from fastapi import APIRouter

from quire.server.http.errors import ApiError
from quire.server.http.state import ServerState

__all__ = ["UNSUPPORTED_ROUTES", "make_router"]

_EMBEDDINGS = "Quire serves models that generate text"
_MEDIA = "Quire takes and gives text only"
_STORED = "Quire stores nothing between requests"
_ADAPTERS = "start the server with --enable-lora, --admin-api-key KEY and --lora-root DIR"
_CONTROL = "it is for development, and Quire has /admin with --admin-api-key"
_SLEEP = "the weights stay on the device; stop the server"
_PROFILE = "fetch /trace, or run quire trace"
_EXPERTS = "experts are not spread over GPUs"
_TUNING = "Quire serves models and does not train them"

UNSUPPORTED_ROUTES: Mapping[str, str] = MappingProxyType(
    {
        "/v1/messages": "use /v1/chat/completions",
        "/v1/embeddings": _EMBEDDINGS,
        "/v1/rerank": _EMBEDDINGS,
        "/v2/rerank": _EMBEDDINGS,
        "/rerank": _EMBEDDINGS,
        "/v1/score": _EMBEDDINGS,
        "/score": _EMBEDDINGS,
        "/pooling": _EMBEDDINGS,
        "/classify": _EMBEDDINGS,
        "/v1/moderations": _EMBEDDINGS,
        "/v1/audio": _MEDIA,
        "/v1/images": _MEDIA,
        "/v1/videos": _MEDIA,
        "/v1/realtime": _MEDIA,
        "/v1/files": _STORED,
        "/v1/uploads": _STORED,
        "/v1/batches": "send the requests by themselves",
        "/v1/vector_stores": _STORED,
        "/v1/conversations": _STORED,
        "/v1/assistants": _STORED,
        "/v1/threads": _STORED,
        "/v1/fine_tuning": _TUNING,
        "/v1/evals": _TUNING,
        "/v1/load_lora_adapter": _ADAPTERS,
        "/v1/unload_lora_adapter": _ADAPTERS,
        "/sleep": _SLEEP,
        "/wake_up": _SLEEP,
        "/is_sleeping": _SLEEP,
        "/pause": _CONTROL,
        "/resume": _CONTROL,
        "/reset_prefix_cache": "give requests a cache_salt of their own, or start with --no-enable-prefix-caching",
        "/reset_mm_cache": _MEDIA,
        "/collective_rpc": _CONTROL,
        "/server_info": "the log and /v1/models say what is served",
        "/tokenizer_info": "use /tokenize and /detokenize",
        "/start_profile": _PROFILE,
        "/stop_profile": _PROFILE,
        "/scale_elastic_ep": _EXPERTS,
        "/is_scaling_elastic_ep": _EXPERTS,
        "/generate": "use /v1/completions",
        "/inference/v1/generate": "use /v1/completions, which takes and returns token ids",
    }
)
"""Path, whatever follows it included, and what to do instead or why it is not there."""
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def make_router(state: ServerState) -> APIRouter:
    """The routes. They are not part of the OpenAPI document, which lists what can be used."""
    routes = APIRouter(include_in_schema=False)

    for path, reason in UNSUPPORTED_ROUTES.items():
        _add_refusal(routes, (path, path + "/{rest:path}"), f"{path} is not supported: {reason}")
    stored = "/v1/chat/completions/{rest:path}"
    _add_refusal(routes, (stored,), "/v1/chat/completions/ID is not supported: completions are not stored")
    below = "/v1/responses/{name}/{rest:path}"
    _add_refusal(routes, (below,), "what is below /v1/responses/ID is not supported: an answer comes with its request")
    changed = ("/v1/models/{name:path}",)
    _add_refusal(routes, changed, f"changing a model is not supported: {_TUNING}", ["POST", "PUT", "PATCH", "DELETE"])
    return routes


def _add_refusal(routes: APIRouter, paths: Sequence[str], message: str, methods: Sequence[str] = _METHODS) -> None:
    async def refuse_route() -> NoReturn:
        raise ApiError(400, message, code="unsupported")

    for path in paths:
        routes.add_api_route(path, refuse_route, methods=list(methods), response_model=None)
