"""The OpenAPI document: what each route takes and answers, with every status that is sent.

Routes read and write bytes themselves, so each says here what FastAPI cannot see: ``describe_operation`` is its
``openapi_extra``. Routes that plugins add are described as FastAPI does.
"""

from __future__ import annotations

import warnings
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quire.server.http.protocol import answers
from quire.server.http.protocol.admin import PolicyBody
from quire.server.http.protocol.chat import ChatBody
from quire.server.http.protocol.common import Body
from quire.server.http.protocol.completion import CompletionBody
from quire.server.http.protocol.response_body import ResponseBody
from quire.server.http.protocol.tokens import DetokenizeBody, TokenizeBody

__all__ = ["GENERATION_ERRORS", "describe_app", "describe_operation"]

_BODIES: tuple[type[BaseModel], ...] = (
    ChatBody,
    CompletionBody,
    ResponseBody,
    TokenizeBody,
    DetokenizeBody,
    PolicyBody,
)
_ANSWERS: tuple[type[BaseModel], ...] = tuple(getattr(answers, name) for name in answers.__all__)
_REFERENCE = "#/components/schemas/{model}"
_HTTP_METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
_ERRORS = {
    400: "The request cannot be served as it is: the error says which field is to be changed",
    401: "The API key is missing or wrong",
    403: "The request comes from a web page of another site, or names the group of another API key",
    404: "There is no such model, or nothing that could answer",
    413: "The body is too large",
    415: "The body is not sent as JSON",
    429: "The queue is full; try again after the seconds in Retry-After",
    500: "The engine failed on this request; the server's log says more",
    503: "The server is starting or shutting down, or its engine is gone",
}
_EVENT = (
    "An event of the answer where `stream` is true. Its data is a chunk as JSON, or an error where the stream cannot "
    "go on; the last event says [DONE]."
)

GENERATION_ERRORS = (400, 404, 413, 415, 429, 500, 503)
"""What can be answered to a body that asks for text."""


def describe_operation(
    operation_id: str,
    answer: type[BaseModel] | tuple[type[BaseModel], ...] | None,
    *,
    body: type[Body] | tuple[type[Body], ...] | None = None,
    chunk: type[BaseModel] | tuple[type[BaseModel], ...] | None = None,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The part of an operation that its route's function does not tell: the JSON ``answer``, and the JSON ``body``; the
    ``chunk`` of its streams; and the statuses of its errors. Several models are alternatives."""
    described: dict[str, Any] = {"operationId": operation_id, "responses": {}}
    content = {}
    if answer is not None:
        content["application/json"] = {"schema": _refer_to(answer)}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _describe_event(chunk)}
    if content:
        described["responses"]["200"] = {"content": content}
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _refer_to(body)}}}
    for status in errors:
        described["responses"][str(status)] = _describe_error(status)
    return described


def describe_app(app: FastAPI, has_api_keys: bool) -> None:
    """Complete the document of an application: schemas, API keys, and what the middleware answers."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate Operation ID")  # see _make_ids_unique
            document = plain()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas.update(_make_schemas())
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method in _HTTP_METHODS:
                    _complete_operation(operation, method, _needs_key(path) and has_api_keys, has_api_keys)
        _make_ids_unique(document)
        if has_api_keys:
            components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _make_ids_unique(document: dict[str, Any]) -> None:
    """A route of several methods, or of a plugin, may have brought the same id twice."""
    known = set[str]()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in _HTTP_METHODS:
                if operation.get("operationId") in known:
                    operation["operationId"] = f"{method}_{operation['operationId']}"
                if operation["operationId"] in known:
                    operation["operationId"] = f"{method}_{path}"
                known.add(operation["operationId"])


def _needs_key(path: str) -> bool:
    return path.startswith("/v1/") or path == "/invocations"


def _complete_operation(operation: dict[str, Any], method: str, needs_key: bool, has_api_keys: bool) -> None:
    responses = operation["responses"]
    # Parameters that cannot be read are answered with 400, in the one shape of errors.
    if responses.pop("422", None) is not None:
        responses["400"] = _describe_error(400)
    if needs_key:
        operation["security"] = [{"ApiKey": []}]
        responses["401"] = _describe_error(401)
    if method not in ("get", "head", "options") and not has_api_keys:
        responses["403"] = _describe_error(403)


def _describe_error(status: int) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=answers.ErrorAnswer.__name__)}
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": schema}}}


def _describe_event(chunk: type[BaseModel] | tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The schema of one event, which is what ``schema`` means for event streams before OpenAPI 3.2."""
    chunks = chunk if isinstance(chunk, tuple) else (chunk,)
    content = {"contentMediaType": "application/json", "contentSchema": _refer_to((*chunks, answers.ErrorAnswer))}
    data = {"anyOf": [{"type": "string", **content}, {"const": "[DONE]"}]}
    return {"type": "object", "description": _EVENT, "properties": {"data": data}, "required": ["data"]}


def _refer_to(models: type[BaseModel] | tuple[type[BaseModel], ...]) -> dict[str, Any]:
    if isinstance(models, tuple):
        return {"anyOf": [_refer_to(model) for model in models]}
    return {"$ref": _REFERENCE.format(model=models.__name__)}


def _make_schemas() -> dict[str, Any]:
    """The schemas to which ``describe_operation`` refers, by name."""
    wanted = [*((model, "validation") for model in _BODIES), *((model, "serialization") for model in _ANSWERS)]
    _, document = models_json_schema(wanted, ref_template=_REFERENCE)  # type: ignore[arg-type]
    definitions: dict[str, Any] = document["$defs"]
    return definitions
