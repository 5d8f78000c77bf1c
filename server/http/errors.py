"""Errors as HTTP answers, in the JSON shape of the OpenAI API."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from quire.core.errors import (
    ContextLengthError,
    DeadlineUnmeetableError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    QuireError,
    RequestFailedError,
    UnsupportedError,
)

__all__ = [
    "ApiError",
    "ClientDisconnectedError",
    "ModelNotFoundError",
    "UnavailableError",
    "add_error_handlers",
    "encode_error",
    "make_error_response",
    "make_validation_error",
]

log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_HINTS = {
    404: "there is nothing at this path; /docs lists the routes",
    405: "this path does not take this method; /docs lists the routes",
}
RETRY_AFTER_S = 1
_MAX_NAMES = 32
_MAX_SHOWN_PATH = 100


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


class ModelNotFoundError(ApiError):
    """A request for a model that is not served."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        names = ", ".join(repr(each) for each in served[:_MAX_NAMES])
        names += f" and {len(served) - _MAX_NAMES} more" if len(served) > _MAX_NAMES else ""
        super().__init__(
            404, f"the model {name[:200]!r} does not exist; served here: {names}", param="model", code="model_not_found"
        )


class UnavailableError(ApiError):
    """No request can be taken now."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, code="unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})


class ClientDisconnectedError(Exception):
    """The client closed the connection before its answer was ready."""


def encode_error(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code or HTTPStatus(status).name.lower()}
    return msgspec.json.encode({"error": error})


def make_error_response(error: Exception) -> Response:
    """The answer to ``error``, whatever it is. What is not a user's or the client's doing is logged, and not shown."""
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=499)
    api_error = _to_api_error(error)
    if api_error is None:
        log.error("a request failed", exc_info=error)
        api_error = ApiError(500, "internal server error; the server's log says more", code="internal_error")
    body = encode_error(api_error.status, api_error.message, api_error.param, api_error.code)
    return Response(body, api_error.status, api_error.headers, "application/json")


def make_validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints, on one line. Places inside unions are left out of ``param``."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json"
        )
    where = _field_path(first["loc"])
    message = " ".join(str(first["msg"]).removeprefix("Value error, ").split())
    shown = repr(first.get("input"))
    shown_input = (
        ""
        if first["type"] in ("missing", "value_error")
        else f", got {shown if len(shown) <= 100 else shown[:100] + '...'}"
    )
    return ApiError(400, f"{where or 'the body'}: {message[:1].lower()}{message[1:]}{shown_input}", param=where or None)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the one shape."""

    async def handle(request: Request, error: Exception) -> Response:
        response = make_error_response(error)
        if response.status_code == 405 and (methods := _find_methods(app, request.url.path)):
            response.headers["Allow"] = ", ".join(methods)  # the framework names those of one of several routes
        if response.status_code == 404 and isinstance(error, HTTPException):
            near = _find_near(app, request.url.path)
            body = encode_error(404, f"there is nothing at this path; did you mean {near}? /docs lists the routes")
            return Response(body, 404, media_type="application/json") if near else response
        return response

    handler: Callable[[Request, Exception], Awaitable[Response]] = handle
    known = (ApiError, QuireError, HTTPException, RequestValidationError, ValidationError, ClientDisconnectedError)
    for kind in known:
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, handler)


def _find_methods(app: FastAPI, path: str) -> list[str]:
    """The methods that a path takes, by the OpenAPI document."""
    described = app.openapi()["paths"].items()
    return [method.upper() for known, methods in described if compile_path(known)[0].match(path) for method in methods]


def _find_near(app: FastAPI, path: str) -> str | None:
    """The route that a wrong path may mean: with ``/v1`` before it, without the second ``/v1``, or spelt alike."""
    routes = [known for known in app.openapi()["paths"] if "{" not in known]
    path = path[:_MAX_SHOWN_PATH].rstrip("/")
    guesses = [guess for guess in (f"/v1{path}", path.removeprefix("/v1")) if guess in routes]
    return next(iter(guesses or difflib.get_close_matches(path, routes, n=1, cutoff=0.8)), None)


def _to_api_error(error: Exception) -> ApiError | None:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        code = "deadline_unmeetable" if isinstance(error, DeadlineUnmeetableError) else "queue_full"
        return ApiError(429, _to_one_line(error), code=code, headers={"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, InvalidRequestError):
        return ApiError(400, _to_one_line(error), param=error.param, code=_invalid_request_code(error))
    if isinstance(error, EngineDeadError):
        return UnavailableError(_to_one_line(error))
    if isinstance(error, RequestFailedError):
        return ApiError(500, _to_one_line(error), code="engine_error")
    if isinstance(error, RequestValidationError | ValidationError):
        return make_validation_error(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(
            error.status_code, _HINTS.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
        )
    return None


def _invalid_request_code(error: InvalidRequestError) -> str:
    if isinstance(error, ContextLengthError):
        return "context_length_exceeded"
    return "unsupported" if isinstance(error, UnsupportedError) else "invalid_value"


def _to_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _field_path(loc: Sequence[Any]) -> str:
    """``("messages", 3, "content", "str")`` -> ``messages[3].content``: fields of the body, and indices of lists."""
    text, before = "", None
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif before is None or isinstance(before, int):
            text += f".{part}" if text else str(part)
        else:
            break  # a member of a union, or a key in a mapping of the client's
        before = part
    return text
