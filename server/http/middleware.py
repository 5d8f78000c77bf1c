"""Middleware of every HTTP request, as plain ASGI: request id, API key, body size, draining, requests in flight."""

from __future__ import annotations

import asyncio
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.http.api_keys import ApiKeys
from quire.server.http.errors import ApiError, UnavailableError, make_error_response
from quire.server.http.protocol.common import MAX_REQUEST_ID_CHARS
from quire.server.http.state import ServerState

__all__ = ["RequestMiddleware", "get_key", "get_key_name", "get_request_id"]

_ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class RequestMiddleware:
    """Let a request through to ``app``, or answer it here.

    Streams pass untouched: only the first message of a response is looked at.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._keys = state.api_keys
        admin_key = state.settings.admin_api_key
        self._admin_keys = ApiKeys([] if admin_key is None else [admin_key])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if root_path := self._state.settings.root_path.rstrip("/"):
            scope["root_path"] = root_path  # without one, that of the server or of the application around this one
        path = _find_route_path(scope)
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["request_id"] = _read_request_id(headers)

        started, status, begin = False, 500, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, int(message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = get_request_id(scope)
            await send(message)

        served_scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        is_api = path.startswith("/v1/") or path == "/invocations"
        self._state.begin_request(is_api)
        try:
            self._check_request(scope, path, headers, is_api)
            # HEAD is answered as GET: uvicorn sends the headers alone, and routes need not name both.
            await self._app(served_scope, self._limit_body(receive), answer)
        except asyncio.CancelledError:
            if not self._state.draining:
                status = 499  # its client waits no more
                raise
            response = make_error_response(UnavailableError("the server is shutting down; send the request to another"))
            if not started:
                await response(scope, receive, answer)
        except Exception as error:
            response = make_error_response(error)
            if not started:
                await response(scope, receive, answer)
        finally:
            self._state.end_request(is_api)
            handler = getattr(served_scope.get("route"), "path", None)
            self._state.http_metrics.record_request(handler, scope["method"], status, time.perf_counter() - begin)

    def _check_request(self, scope: Scope, path: str, headers: Headers, is_api: bool) -> None:
        is_admin = path.startswith("/admin/") or (path in _ADMIN_PATHS and bool(self._admin_keys))
        keys = self._admin_keys if is_admin else self._keys if is_api else None
        if keys:
            key = keys.find_key(headers.get("authorization", ""))
            if key is None:
                message = f"the {'admin ' if is_admin else ''}API key is missing or wrong; send it as "
                message += "'Authorization: Bearer KEY'"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            scope["state"]["key_name"], scope["state"]["key"] = key.name, key.key
        if not self._keys and scope["method"] not in _SAFE_METHODS and _is_foreign_page(headers):
            origin = headers["origin"]
            if not {origin, "*"} & set(self._state.settings.allowed_origins):
                message = f"requests from web pages of {origin[:200]!r} are refused: start the server with --api-key"
                raise ApiError(403, f"{message} or allow them by --allowed-origins")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._state.settings.max_request_bytes:
            raise self._too_large_error()
        if is_api and scope["method"] == "POST" and self._state.draining:
            raise UnavailableError("the server is shutting down; send the request to another")

    def _limit_body(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message: Message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._state.settings.max_request_bytes:
                raise self._too_large_error()
            return message

        return limited

    def _too_large_error(self) -> ApiError:
        limit = self._state.settings.max_request_bytes
        return ApiError(413, f"the body is larger than {limit} bytes; send less, or raise --max-request-bytes")


def get_request_id(scope: Scope, id_in_body: str | None = None) -> str:
    """The id of a request: the client's ``X-Request-Id``, that of its body, or a fresh one. The first call decides."""
    state = scope["state"]
    state["request_id"] = state["request_id"] or id_in_body or uuid.uuid4().hex
    return str(state["request_id"])


def get_key_name(scope: Scope) -> str | None:
    """The name of the API key with which a request came; None if it has none."""
    name: str | None = scope["state"].get("key_name")
    return name


def get_key(scope: Scope) -> str | None:
    """The API key with which a request came; None if the server asks for none."""
    key: str | None = scope["state"].get("key")
    return key


def _find_route_path(scope: Scope) -> str:
    """The path by which routes are found: the same whether a proxy cuts off ``--root-path`` or not. It is cut off once,
    as the router does it, so that no request is checked by one path and served by another."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and (path == root or path.startswith(root + "/")) else path


def _is_foreign_page(headers: Headers) -> bool:
    """Whether a browser sends this for a web page of another host than the server's own, as the client or the proxy
    before it names that. Applications and extensions have an ``Origin`` with a scheme of their own and are no pages."""
    scheme, _, host = headers.get("origin", "").partition("://")
    if scheme == "null":  # a sandboxed frame, or a file
        return True
    return scheme in ("http", "https") and host not in (headers.get("host"), headers.get("x-forwarded-host"))


def _read_request_id(headers: Headers) -> str | None:
    presented = headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS]
    return presented if presented and presented.isascii() and presented.isprintable() else None
