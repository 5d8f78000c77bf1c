"""Random requests: whatever comes, an answer in the one shape, and never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..conftest import RunningServer, check_error

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 0.5, 1e-9, 2**31, 2**63, 2**64, -(2**63)])
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant", "tool", ""]) | JSON,
        "content": st.text(max_size=20) | JSON,
    },
    optional={"tool_calls": JSON, "name": JSON},
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), NUMBERS | JSON),
    **dict.fromkeys(("top_k", "seed", "min_tokens", "priority", "frequency_penalty"), NUMBERS | JSON),
    "n": st.sampled_from([None, 1, 2, 0, -1, 1.0, "2", 10**9]) | JSON.filter(lambda v: not isinstance(v, int | float)),
    "logprobs": st.booleans() | st.integers(-2, 25) | JSON,
    "top_logprobs": st.integers(-2, 25) | JSON,
    "echo": JSON,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | JSON,
    "stop_token_ids": st.lists(st.integers(-5, 400), max_size=3) | JSON,
    "logit_bias": st.dictionaries(st.integers(-5, 400).map(str), NUMBERS, max_size=3) | JSON,
    "allowed_token_ids": st.lists(st.integers(-5, 400), max_size=3) | JSON,
    "logprob_token_ids": st.lists(st.integers(-5, 400), max_size=3) | JSON,
    "bad_words": st.lists(st.text(max_size=3), max_size=3) | JSON,
    "stream": st.booleans() | JSON,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | JSON,
    "tools": JSON,
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | JSON,
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}) | JSON,
    "chat_template_kwargs": st.dictionaries(st.text(max_size=10), JSON, max_size=2) | JSON,
    "continue_final_message": st.booleans() | JSON,
    "add_generation_prompt": st.booleans() | JSON,
    "cache_salt": st.text(max_size=5) | JSON,
    "skip_special_tokens": JSON,
    "include_stop_str_in_output": JSON,
    "prompt_logprobs": st.integers(-2, 25) | JSON,
}
PROMPT = st.text(min_size=1, max_size=20) | st.lists(st.integers(-2, 330), max_size=8) | JSON
FEW = settings(max_examples=60)


def post(http: httpx.Client, path: str, body: Any) -> None:
    response = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (response.status_code, response.text, body)
    if response.status_code != 200:
        check_error(response, response.status_code)


@FEW
@given(body=JSON)
def test_any_json_at_all(http: httpx.Client, body: Any) -> None:
    for path in (CHAT, TEXT, RESPONSES, "/tokenize", "/detokenize"):
        post(http, path, body)


@FEW
@given(body=st.fixed_dictionaries({"prompt": PROMPT}, optional=FIELDS))
def test_any_completion(http: httpx.Client, body: dict[str, Any]) -> None:
    post(http, TEXT, {**body, "max_tokens": 2})


@FEW
@given(body=st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=3)}, optional=FIELDS))
def test_any_chat(http: httpx.Client, body: dict[str, Any]) -> None:
    post(http, CHAT, {**body, "max_tokens": 2})


ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]) | JSON},
    optional={
        **dict.fromkeys(("name", "arguments", "call_id"), st.text(max_size=5) | JSON),
        **dict.fromkeys(("content", "output", "summary"), st.text(max_size=5) | JSON),
        "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
    },
)
IN_RESPONSES = {name: value for name, value in FIELDS.items() if name not in ("n", "logprobs", "top_logprobs")}
IN_RESPONSES |= dict.fromkeys(("text", "reasoning", "include", "truncation", "metadata", "previous_response_id"), JSON)


@FEW
@given(body=st.fixed_dictionaries({"input": st.text() | st.lists(ITEM, max_size=3)}, optional=IN_RESPONSES))
def test_any_response(http: httpx.Client, body: dict[str, Any]) -> None:
    post(http, RESPONSES, {**body, "max_output_tokens": 2})


@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes(http: httpx.Client, data: bytes) -> None:
    response = http.post(TEXT, content=data, headers={"content-type": "application/json"})
    check_error(response, 400)
