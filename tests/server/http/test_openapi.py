"""``/openapi.json`` says what is taken and sent; ``make fuzz-api`` tries it with random requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from quire.server.http.protocol import answers

from ..conftest import RunningServer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
ALL = {"logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 3}


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def list_operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): each for path, all_ in document["paths"].items() for method, each in all_.items()}


def find_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from find_references(each)
    elif isinstance(value, list):
        for each in value:
            yield from find_references(each)


def test_operations_are_unique_and_references_lead_somewhere(document: dict[str, Any]) -> None:
    operations = list_operations(document)
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(set(ids)) == len(ids) and {"chat_completions", "completions", "metrics", "ping", "post_ping"} <= set(ids)
    for reference in find_references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference
    for key, operation in operations.items():
        assert "422" not in operation["responses"], key
        for status, response in operation["responses"].items():
            assert response["content"], (key, status)
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, (key, status)


def test_a_method_that_is_not_taken_is_answered_with_those_that_are(http: httpx.Client) -> None:
    for path, methods in {"/v1/responses/x": "GET, DELETE", "/ping": "GET, POST", TEXT: "POST"}.items():
        response = http.put(path)
        assert response.status_code == 405 and set(response.headers["allow"].split(", ")) == set(methods.split(", "))


def test_bodies_name_what_they_need(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ChatBody"]["required"] == ["messages"] and schemas["CompletionBody"]["required"] == ["prompt"]
    assert schemas["DetokenizeBody"]["required"] == ["tokens"] and schemas["Message"]["required"] == ["role"]
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(schemas["ChatCompletion"]["required"])
    assert set(schemas["Error"]["required"]) == {"message", "type", "param", "code"}
    forms = schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]
    assert [form["type"] for form in forms] == ["string", "array", "array", "array"]
    for path in (CHAT, TEXT, "/invocations"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
    for path in ("/metrics", "/metrics/{name}"):
        assert set(document["paths"][path]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_keys_are_in_the_document_where_the_server_wants_them(
    document: dict[str, Any], start: Callable[..., RunningServer]
) -> None:
    assert "securitySchemes" not in document["components"]
    for operation in list_operations(document).values():
        assert "security" not in operation and "401" not in operation["responses"]
    with start("--api-key", "k").http as http:
        guarded = http.get("/openapi.json").json()
        assert guarded["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
        for (method, path), operation in list_operations(guarded).items():
            if "{" in path:
                continue
            assert (http.request(method, path).status_code == 401) == ("security" in operation), path
            assert ("401" in operation["responses"]) == ("security" in operation), path


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", TEXT, {"prompt": "x", "n": 0}, {}, 400),
        ("POST", TEXT, {"prompt": "x", "n": "2"}, {}, 400),
        ("POST", CHAT, {"messages": HI, "temperature": "0.5"}, {}, 400),
        ("POST", CHAT, {"messages": HI, "model": "other"}, {}, 404),
        ("POST", CHAT, {"messages": HI}, {"content-type": "text/plain"}, 415),
        ("POST", CHAT, {"messages": HI}, {"origin": "http://evil.example"}, 403),
        ("POST", "/tokenize", {"prompt": " " * (17 << 20)}, {}, 413),
        ("POST", "/detokenize", {"tokens": [None]}, {}, 400),
        ("POST", "/detokenize", {"tokens": [10**6]}, {}, 400),
        ("POST", "/invocations", {"prompt": [[None]]}, {}, 400),
        ("GET", "/trace?steps=many", None, {}, 400),
        ("GET", "/v1/models/other", None, {}, 404),
        ("GET", "/health", None, {}, 200),
        ("GET", "/metrics", None, {}, 200),
    ],
)
def test_statuses_that_are_sent_are_documented(
    http: httpx.Client,
    document: dict[str, Any],
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
) -> None:
    data = None if body is None else json.dumps(body)
    response = http.request(method, path, content=data, headers={"content-type": "application/json", **headers})
    assert response.status_code == status, response.text
    documented = path.partition("?")[0].replace("/v1/models/other", "/v1/models/{name}")
    content = document["paths"][documented][method.lower()]["responses"][str(status)]["content"]
    assert response.headers["content-type"].partition(";")[0] in content
    if status != 200:
        answers.ErrorAnswer.model_validate_json(response.content, strict=True)


@pytest.mark.parametrize(
    ("method", "path", "body", "model"),
    [
        ("POST", CHAT, {"messages": HI, **ALL}, answers.ChatCompletion),
        ("POST", TEXT, {"prompt": "x", **ALL, "logprobs": 2, "echo": True, "top_logprobs": None}, answers.Completion),
        ("POST", TEXT, {"prompt": "x", "max_tokens": 2}, answers.Completion),
        ("POST", "/tokenize", {"prompt": "x", "return_token_strs": True}, answers.TokenizedText),
        ("POST", "/detokenize", {"tokens": [5, 6]}, answers.DetokenizedText),
        ("POST", "/v1/responses", {"input": "x", "max_output_tokens": 2}, answers.ResponseAnswer),
        ("GET", "/v1/models", None, answers.ModelList),
        ("GET", "/v1/models/tiny", None, answers.ModelCard),
        ("GET", "/health", None, answers.Health),
        ("GET", "/version", None, answers.Version),
        ("GET", "/load", None, answers.Load),
        ("GET", "/trace", None, answers.StepTrace),
    ],
)
def test_answers_are_as_described(
    http: httpx.Client, method: str, path: str, body: Any, model: type[BaseModel]
) -> None:
    response = http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    assert_described(model, response.content)


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 2}, answers.ChatChunk),
        (TEXT, {"prompt": "x", "logprobs": 2}, answers.CompletionChunk),
    ],
)
def test_events_are_as_described(http: httpx.Client, path: str, body: Any, model: type[BaseModel]) -> None:
    options = {"stream": True, "max_tokens": 3, "n": 2, "stream_options": {"include_usage": True}}
    response = http.post(path, json={**body, **options, "return_token_ids": True})
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    *events, last, rest = response.text.split("\n\n")
    assert last == "data: [DONE]" and rest == "" and len(events) > 3
    for event in events:
        assert_described(model, event.removeprefix("data: ").encode())


def assert_described(model: type[BaseModel], data: bytes) -> None:
    """It fits the model, and has no field on its first levels that the model does not name."""
    parsed = model.model_validate_json(data, strict=True)
    answer = json.loads(data)
    if model is not answers.ResponseAnswer:  # of whose many fields the most important are described
        assert set(answer) <= set(model.model_fields), set(answer) - set(model.model_fields)
    for choice, described in zip(answer.get("choices", ()), getattr(parsed, "choices", ()), strict=True):
        assert set(choice) <= set(type(described).model_fields), set(choice) - set(type(described).model_fields)
