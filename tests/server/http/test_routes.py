"""Routes beside generation, headers, and what happens when clients leave."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import httpx
import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from quire.core.engine.async_llm import AsyncLLM
from quire.core.version import __version__
from quire.server.cli.main import main
from quire.server.http.app import create_app
from quire.server.http.protocol.chat import ChatBody
from quire.server.http.protocol.completion import CompletionBody
from quire.server.http.protocol.tokens import TokenizeBody

from ..conftest import RunningServer, check_error, until

ROOT = Path(__file__).parents[3]
TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
JSON_HEADERS = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
ABORTED = 'quire:request_success_total{finished_reason="abort",model_name="tiny"}'


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


def test_health_and_its_relatives(http: httpx.Client) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert http.get(path).status_code == 200
    assert http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": __version__}
    load = http.get("/load").json()
    assert set(load) == {"server_load", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}


def test_the_document_of_the_api(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert {"ChatBody", "CompletionBody", "StreamOptions"} <= used <= set(document["components"]["schemas"])
    assert "temperature" in document["components"]["schemas"]["ChatBody"]["properties"]


def api_paths() -> list[str]:
    """The path of every route of the API, without those that FastAPI adds for its documentation."""
    app = create_app(cast(AsyncLLM, None))
    return sorted({route.path for route in app.routes if isinstance(route, APIRoute)})


@pytest.mark.parametrize("path", api_paths())
def test_every_route_is_tested_and_documented(path: str) -> None:
    name = path.partition("/{")[0]
    tests = [file.read_text() for file in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{name}"' in text or f'"{name}/' in text for text in tests), f"no test requests {path}"
    assert f"`{name}`" in (ROOT / "docs" / "server.md").read_text(), f"docs/server.md lacks {path}"


def test_models_by_each_name(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny", "also-tiny"]
    model = http.get("/v1/models/also-tiny").json()
    assert model == listed["data"][1] and model["object"] == "model" and model["max_model_len"] == 2048
    message = check_error(http.get("/v1/models/large"), 404, "model")
    assert "'tiny', 'also-tiny'" in message
    assert http.get("/v1/models/").json() == listed


def test_the_trace_of_the_last_steps(server: RunningServer, http: httpx.Client, tmp_path: Path) -> None:
    assert http.post(TEXT, json={"prompt": "x", "max_tokens": 6, "ignore_eos": True}).status_code == 200
    events = http.get("/trace", params={"steps": 3}).json()["traceEvents"]
    assert len({event["name"] for event in events if event["ph"] == "X"}) == 3
    for steps in ("0", "-1", "many", "1000000000"):
        check_error(http.get("/trace", params={"steps": steps}), 400)
    out = tmp_path / "trace.json"
    assert main(["trace", "--url", server.url, "--steps", "2", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["traceEvents"]) == 6 + 2 * 5
    assert main(["trace", "--url", f"{server.url}/nowhere", "--out", str(out)]) == 2


def test_request_ids(http: httpx.Client) -> None:
    answer = http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7" and answer.json()["id"] == "cmpl-mine-7"
    again = http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "mine-7"})
    assert again.status_code == 200, "an id may be used twice"
    fresh = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert fresh[0] != fresh[1]
    odd = http.get("/health", headers={"X-Request-Id": "a" * 4000}).headers["x-request-id"]
    assert len(odd) <= 128
    for path, prompt in (
        (TEXT, {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
    ):
        body = {**prompt, "max_tokens": 1, "request_id": "mine-8"}
        answer = http.post(path, json=body)
        assert answer.headers["x-request-id"] == "mine-8" and answer.json()["id"].endswith("cmpl-mine-8")
        assert http.post(path, json=body, headers={"X-Request-Id": "mine-9"}).json()["id"].endswith("cmpl-mine-9")
        for wrong in ("", "a\nb", "a" * 129):
            check_error(http.post(path, json={**body, "request_id": wrong}), 400, "request_id")


def test_the_wire_format_of_a_stream(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True, "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert {"index", "delta", "logprobs", "finish_reason"} <= set(chunk["choices"][0])


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/metrics", "/version", "/openapi.json"])
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    answer = http.head(path)
    assert answer.status_code == 200 and answer.content == b""
    assert answer.headers["content-type"] == http.get(path).headers["content-type"]


def test_head_of_what_cannot_be_got(http: httpx.Client) -> None:
    assert http.head(TEXT).status_code == 405
    assert http.head("/v1/nothing").status_code == 404
    assert http.head("/v1/models/large").status_code == 404


def test_tiny_temperatures_and_no_nucleus_are_greedy(http: httpx.Client) -> None:
    body = {"prompt": "greedy", "max_tokens": 12, "ignore_eos": True}
    greedy = http.post(TEXT, json={**body, "temperature": 0}).json()["choices"][0]["text"]
    for field in ({"temperature": 1e-40}, {"temperature": 1e-9, "top_p": 0.5}, {"top_p": 0}, {"top_p": 0, "top_k": 5}):
        assert http.post(TEXT, json={**body, **field}).json()["choices"][0]["text"] == greedy, field


def test_null_is_the_default_of_every_optional_field(http: httpx.Client) -> None:
    for path, model, body in (
        ("/v1/chat/completions", ChatBody, {"messages": [{"role": "user", "content": "hi"}]}),
        (TEXT, CompletionBody, {"prompt": "x"}),
        ("/tokenize", TokenizeBody, {"prompt": "x"}),
    ):
        nothing = dict.fromkeys(name for name, field in model.model_fields.items() if not field.is_required())
        response = http.post(path, json={**nothing, **body})
        assert response.status_code == 200, (path, response.text)


def test_no_web_page_may_read_answers_unless_it_is_allowed(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("allowed", ["http://localhost:3000", "*"])
def test_a_web_page_of_an_allowed_origin(start: Callable[..., RunningServer], allowed: str) -> None:
    server = start("--allowed-origins", allowed)
    page = {"Origin": "http://localhost:3000"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with server.http as http:
        preflight = http.options("/v1/chat/completions", headers={**page, **asked})
        assert preflight.status_code == 200
        assert "content-type" in preflight.headers["access-control-allow-headers"]
        answers = [
            preflight,
            http.get("/v1/models", headers=page),
            http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=page),
            http.post(TEXT, json={"prompt": "x", "max_tokens": 1, "stream": True}, headers=page),
            http.post(TEXT, json={"prompt": ""}, headers=page),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 400]
        assert {answer.headers["access-control-allow-origin"] for answer in answers} == {allowed}
        if allowed != "*":
            foreign = {"Origin": "https://elsewhere.example"}
            assert http.post(TEXT, json={"prompt": "x"}, headers=foreign).status_code == 403
            assert "access-control-allow-origin" not in http.get("/v1/models", headers=foreign).headers


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "Grüße, 本!"
    reply = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) and reply["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    with_prompt = http.post("/tokenize", json=talk).json()["count"]
    without = http.post("/tokenize", json={**talk, "add_generation_prompt": False}).json()["count"]
    assert with_prompt > without > 2
    used = http.post("/v1/chat/completions", json={**talk, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert used == with_prompt
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [99999]}).status_code == 400


def test_token_ids_beside_the_text(http: httpx.Client) -> None:
    body = {"max_tokens": 4, "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    plain = http.post(TEXT, json={**body, "prompt": "ids", "logprobs": 1}).json()["choices"][0]
    assert plain["prompt_token_ids"] == http.post("/tokenize", json={"prompt": "ids"}).json()["tokens"]
    assert len(plain["token_ids"]) == 4
    assert plain["logprobs"]["tokens"] == [f"token_id:{token}" for token in plain["token_ids"]]
    messages = [{"role": "user", "content": "ids"}]
    chat = http.post("/v1/chat/completions", json={**body, "messages": messages, "logprobs": True}).json()
    assert chat["prompt_token_ids"] == http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    choice = chat["choices"][0]
    assert [each["token"] for each in choice["logprobs"]["content"]] == [f"token_id:{t}" for t in choice["token_ids"]]


def test_bad_words_and_allowed_tokens_hold_in_answers_and_streams(server: RunningServer, http: httpx.Client) -> None:
    fields = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    plain = http.post(TEXT, json={**fields, "prompt": "ban"}).json()["choices"][0]
    word = next(char for char in plain["text"] if "!" <= char <= "~")
    allowed = sorted({*plain["token_ids"][1:], 40, 41})
    for bans in (
        {"bad_words": [word]},
        {"allowed_token_ids": allowed},
        {"bad_words": [word], "allowed_token_ids": allowed},
    ):
        answer = http.post(TEXT, json={**fields, **bans, "prompt": "ban"}).json()["choices"][0]
        assert "allowed_token_ids" not in bans or set(answer["token_ids"]) <= set(allowed)
        assert "bad_words" not in bans or word not in answer["text"]
        talk = {"model": "tiny", "messages": [{"role": "user", "content": "ban"}], "max_tokens": 24, "temperature": 0}
        chunks = server.openai.chat.completions.create(**talk, stream=True, extra_body=bans)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text and ("bad_words" not in bans or word not in text)


def test_invocations_are_chats_or_completions(http: httpx.Client) -> None:
    talk = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert http.post("/invocations", json=talk).json()["object"] == "chat.completion"
    assert http.post("/invocations", json={"prompt": "x", "max_tokens": 1}).json()["object"] == "text_completion"
    for content in (b"{", b"[]", b"[" * 5000, b"{}", b'{"messages": 3}', b'{"prompt": "\\ud800"}'):
        response = http.post("/invocations", content=content, headers={"content-type": "application/json"})
        check_error(response, 400)


def test_what_was_not_asked_for_is_null(http: httpx.Client) -> None:
    plain = http.post(TEXT, json={"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 1}).json()["choices"][0]
    assert {plain[name] for name in ("prompt_logprobs", "prompt_token_ids", "token_ids")} == {None}
    talk = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    chat = http.post("/v1/chat/completions", json=talk).json()
    fields = (chat["prompt_logprobs"], chat["prompt_token_ids"], chat["choices"][0]["token_ids"])
    assert fields == (None, None, None)


@pytest.mark.parametrize("prompt", ["The end of a long prompt", list(range(5, 30))], ids=["text", "tokens"])
def test_a_prompt_is_cut_to_its_last_tokens(http: httpx.Client, prompt: str | list[int]) -> None:
    body = {"prompt": prompt, "max_tokens": 1, "return_token_ids": True}
    whole = http.post(TEXT, json=body).json()["choices"][0]["prompt_token_ids"]
    for kept in (1, 3, len(whole), 2000, -1):
        answer = http.post(TEXT, json={**body, "truncate_prompt_tokens": kept}).json()["choices"][0]
        assert answer["prompt_token_ids"] == (whole if kept == -1 else whole[-kept:])
    long = http.post(TEXT, json={**body, "prompt": "x" * 500_000, "max_tokens": 48, "truncate_prompt_tokens": -1})
    assert long.json()["usage"]["prompt_tokens"] == 2000
    talk = {"messages": [{"role": "user", "content": "x" * 5000}], "max_tokens": 1, "truncate_prompt_tokens": 4}
    assert http.post("/v1/chat/completions", json=talk).json()["usage"]["prompt_tokens"] == 4


def test_cached_tokens_are_reported(http: httpx.Client) -> None:
    body = {"prompt": "a prompt that is longer than two blocks of the cache, by far", "max_tokens": 1}
    http.post(TEXT, json=body)
    usage = http.post(TEXT, json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32
    salted = http.post(TEXT, json={**body, "cache_salt": "s"}).json()["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_usage_of_several_choices_counts_the_prompt_once(server: RunningServer, http: httpx.Client, field: str) -> None:
    """A prompt that was never seen comes from no cache, whatever ``n``; usage, streams and metrics agree."""
    body = {"prompt": f"{field}: a prompt longer than two blocks of the cache", "max_tokens": 3, "ignore_eos": True}
    size = len(body["prompt"])
    names = [f'quire:{name}_total{{model_name="tiny"}}' for name in ("prompt_tokens", "generation_tokens")]
    before = [server.metric(name) for name in names]
    usage = http.post(TEXT, json={**body, field: 4}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (size, 12)
    assert [server.metric(name) - value for name, value in zip(names, before, strict=True)] == [size, 12]
    again = http.post(TEXT, json={**body, field: 4}).json()["usage"]
    assert 32 <= again["prompt_tokens_details"]["cached_tokens"] < size
    if field == "n":
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = http.post(TEXT, json={**body, **options, "n": 4}).text.split("data: ")
        assert json.loads(lines[-2])["usage"] == again


def test_a_client_that_leaves_a_stream_frees_its_request(server: RunningServer, http: httpx.Client) -> None:
    before = server.metric(ABORTED)
    with http.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()  # kept: a generator that is dropped closes the response
        next(lines)
        assert server.load()["server_load"] == 1
    until(lambda: server.metric(ABORTED) == before + 1)
    until(lambda: set(server.load().values()) == {0})


def test_a_client_that_leaves_without_a_stream_frees_its_request(server: RunningServer) -> None:
    before = server.metric(ABORTED)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 3}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON_HEADERS % len(body) + body)
        until(lambda: server.load()["server_load"] == 1)
        time.sleep(0.1)
    until(lambda: server.metric(ABORTED) == before + 3)
    until(lambda: server.load()["server_load"] == 0)


def test_many_clients_that_leave(server: RunningServer, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True}).encode()
    for turn in range(20):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON_HEADERS % len(body) + body)
            if turn % 2:
                raw.recv(200)
    until(lambda: server.load()["server_load"] == 0)
    until(lambda: server.load()["num_requests_running"] == 0 and server.load()["num_requests_waiting"] == 0)
    assert http.post(TEXT, json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_metrics_can_be_scraped_and_count(server: RunningServer, http: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        values = {}
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples if ":" in family.name else ():  # others are of HTTP and the process
                if sample.labels.get("finished_reason", "length") == "length" and "le" not in sample.labels:
                    assert sample.labels["model_name"] == "tiny"
                    values[sample.name] = sample.value
        return values

    before = counts()
    body = {"prompt": "count me", "max_tokens": 6, "ignore_eos": True}
    assert http.post(TEXT, json=body).json()["usage"]["completion_tokens"] == 6
    after = counts()
    for prefix in ("quire:", "vllm:"):
        grown = {name: after[prefix + name] - before[prefix + name] for name in COUNTED}
        assert grown == COUNTED
    assert after["vllm:kv_cache_usage_perc"] == after["vllm:gpu_cache_usage_perc"]


COUNTED = {
    "prompt_tokens_total": 8,
    "generation_tokens_total": 6,
    "request_success_total": 1,
    "time_to_first_token_seconds_count": 1,
    "inter_token_latency_seconds_count": 5,
    "time_per_output_token_seconds_count": 5,
    "request_time_per_output_token_seconds_count": 1,
    "e2e_request_latency_seconds_count": 1,
    "request_queue_time_seconds_count": 1,
}
