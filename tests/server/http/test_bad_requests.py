"""Whatever a client sends, it gets an answer in the one shape, and no other request is hurt."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..conftest import RunningServer, check_error

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


BAD: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {"prompt": "x", "temperature": -1}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": True}, "temperature"),
    (TEXT, {"prompt": "x", "top_p": -0.1}, "top_p"),
    (TEXT, {"prompt": "x", "top_p": 1.5}, "top_p"),
    (TEXT, {"prompt": "x", "top_k": -2}, "top_k"),
    (TEXT, {"prompt": "x", "min_p": 2}, "min_p"),
    (TEXT, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    (TEXT, {"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    (TEXT, {"prompt": "x", "frequency_penalty": -3}, "frequency_penalty"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": -5}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    (TEXT, {"prompt": "x", "n": 0}, "n"),
    (TEXT, {"prompt": "x", "n": 1000}, "n"),
    (TEXT, {"prompt": "x", "seed": 2**70}, "seed"),
    (TEXT, {"prompt": "x", "stop": [""]}, "stop"),
    (TEXT, {"prompt": "x", "stop": 5}, "stop"),
    (TEXT, {"prompt": "x", "stop": ["a"] * 65}, "stop"),
    (TEXT, {"prompt": "x", "stop_token_ids": [99999]}, "stop_token_ids"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": -1}, "logprobs"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
    (TEXT, {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    (TEXT, {"prompt": "x", "stop": ["a" * 5000]}, "stop"),
    (TEXT, {"prompt": "x", "stop_token_ids": [1] * 5000}, "stop_token_ids"),
    (TEXT, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    (TEXT, {"prompt": "x", "cache_salt": "a" * 600}, "cache_salt"),
    (TEXT, {"prompt": ["x"] * 64, "n": 17}, "n"),
    (TEXT, {"prompt": ["x"] * 9, "best_of": 128}, "n"),
    (CHAT, {"messages": [USER] * 5000}, "messages"),
    (CHAT, {"messages": [USER], "tools": [{}] * 5000}, "tools"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
    (TEXT, {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    (TEXT, {"prompt": "x", "priority": "high"}, "priority"),
    (TEXT, {"prompt": "x", "cache_salt": ""}, "cache_salt"),
    (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, "prompt"),
    (TEXT, {"prompt": [1, -1]}, "prompt"),
    (TEXT, {"prompt": [1, True]}, "prompt"),
    (TEXT, {"prompt": [99999]}, "prompt"),
    (TEXT, {"prompt": ["x"] * 1025}, "prompt"),
    (TEXT, {"prompt": "x" * 3000}, "prompt"),
    (TEXT, {"prompt": "x" * 3000, "stream": True}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {}, "prompt"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": [USER], "max_completion_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, "prompt"),
]


BAD += [
    (TEXT, {"prompt": "x", field: value}, field)
    for field, value in {
        "bad_words": [" "],
        "allowed_token_ids": [],
        "logprob_token_ids": [1],
        "length_penalty": 0.5,
        "prompt_embeds": "AAAA",
        "logits_processors": ["x.y"],
        "audio": {"voice": "alloy"},
        "modalities": ["text", "audio"],
        "truncate_prompt_tokens": 0,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "now"}}],
    }.items()
]
BAD += [
    (CHAT, {"messages": [USER], field: value}, field)
    for field, value in {
        "echo": True,
        "best_of": 2,
        "length_penalty": 0.5,
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "audio": {"voice": "alloy"},
        "modalities": ["audio"],
        "bad_words": [""],
        "allowed_token_ids": [99999],
        "documents": [{"text": "x"}],
        "add_special_tokens": True,
    }.items()
]
BAD += [
    (path, {**prompt, field: value}, field)
    for path, prompt in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": [USER]}))
    for field, value in {
        "truncation_side": "right",
        "kv_transfer_params": {"do_remote_decode": True},
        "include_reasoning": False,
        "thinking_token_budget": 8,
        "repetition_detection": {"max_pattern_size": 2},
        "extra_body": {"top_k": 3},
    }.items()
]
BAD += [
    (TEXT, {"prompt": "x", "max_completion_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    (TEXT, {"prompt": "x", "echo": True, "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    (TEXT, {"prompt": "x", "stream": True, "best_of": 2}, "best_of"),
    (TEXT, {"prompt": "x", "stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    (TEXT, {"prompt": "x", "logprobs": 0, "logprob_token_ids": [99999]}, "logprob_token_ids"),
    (TEXT, {"prompt": "x", "logprobs": 0, "logprob_token_ids": list(range(129))}, "logprob_token_ids"),
    (CHAT, {"messages": [USER], "logprob_token_ids": [1]}, "logprob_token_ids"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), BAD, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else str(v)
)
def test_bad_fields_get_400(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    check_error(http.post(path, json={"model": "tiny", **body}), 400, param)


def test_a_prompt_too_long_says_by_how_much(http: httpx.Client) -> None:
    message = check_error(http.post(TEXT, json={"prompt": "x" * 3000}), 400, "prompt")
    assert "3000" in message and "2048" in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "x" * 3000}),
        (TEXT, {"prompt": "x" * 300_000}),
        (TEXT, {"prompt": [5] * 3000}),
        (TEXT, {"prompt": "x" * 3000, "stream": True}),
        (TEXT, {"prompt": "x", "max_tokens": 5000, "min_tokens": 5000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
    ],
    ids=["text", "a_text_refused_unread", "tokens", "stream", "min_tokens", "chat"],
)
def test_a_context_that_overflows_is_told_as_by_openai(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Clients and gateways look for the code, or for the beginning of the message, to choose a larger model."""
    response = http.post(path, json={"model": "tiny", **body})
    assert check_error(response, 400).startswith("This model's maximum context length is 2048 tokens. However, ")
    assert response.json()["error"]["code"] == "context_length_exceeded"


OWN_NAMES = [
    *("size", "work", "self", "args", "kwargs", "text", "state", "request", "cls", "conversation", "padding", "tools"),
    *("return_dict", "return_tensors", "chat_template", "messages", "bos_token", "raise_exception", "range"),
    *("documents", "add_generation_prompt", "continue_final_message", "truncation", "max_length", "tokenize"),
]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_no_name_that_a_client_chooses_is_our_own(http: httpx.Client, name: str) -> None:
    """Variables of a template, and unknown fields, may have the name of an argument or an attribute of ours."""
    body = {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": {name: 1}}
    response = http.post(CHAT, json=body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        check_error(response, 400)


@pytest.mark.parametrize("name", ["to_sampling_params", "template_arguments", "echo_only", "model_extra", "self"])
def test_an_unknown_field_may_have_any_name(http: httpx.Client, name: str) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"})):
        assert http.post(path, json={**body, "max_tokens": 1, name: 1}).status_code == 200


@pytest.mark.parametrize(
    "arguments",
    ["[" * 100_000 + "]" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, '{"a": "\\ud800"}', "9" * 5000, "[1]", "NaN"],
    ids=["nested", "nested_objects", "surrogate", "digits", "a_list", "nan"],
)
def test_no_tool_arguments_are_our_fault(http: httpx.Client, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    response = http.post(CHAT, json={"messages": [{"role": "assistant", "tool_calls": [call]}, USER], "max_tokens": 1})
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize(
    "data",
    [b"{", b"", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": NaN}'],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bad_json_gets_400(http: httpx.Client, path: str, data: bytes) -> None:
    check_error(http.post(path, content=data, headers=JSON), 400)


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_body_that_is_not_declared_as_json_gets_415(http: httpx.Client, path: str) -> None:
    """What any web page can make a browser send, without asking: forms and plain text."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", None):
        headers = {} if kind is None else {"content-type": kind}
        message = check_error(http.post(path, content=b'{"prompt": "x", "max_tokens": 1}', headers=headers), 415)
        assert "application/json" in message
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert "Content-Encoding" in check_error(http.post(path, content=b"\x1f\x8b", headers=packed), 415)


def test_spellings_of_the_json_content_type(http: httpx.Client) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"content-type": kind}
        assert http.post(TEXT, content=b'{"prompt": "x", "max_tokens": 1}', headers=headers).status_code == 200


def test_web_pages_of_other_hosts_are_refused_without_a_key(http: httpx.Client) -> None:
    own = f"http://{http.base_url.host}:{http.base_url.port}"
    body = {"prompt": "x", "max_tokens": 1}
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null", own + ".evil.example"):
        check_error(http.post(TEXT, json=body, headers={"origin": origin}), 403)
        check_error(http.post("/tokenize", json=body, headers={"origin": origin}), 403)
        assert http.get("/v1/models", headers={"origin": origin}).status_code == 200
    for origin in (own, "vscode-webview://abc", "app://desktop"):
        assert http.post(TEXT, json=body, headers={"origin": origin}).status_code == 200
    behind_proxy = {"origin": "https://llm.example", "x-forwarded-host": "llm.example"}
    assert http.post(TEXT, json=body, headers=behind_proxy).status_code == 200


def test_unknown_model(http: httpx.Client) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        message = check_error(http.post(path, json={"model": "gpt-5", **body}), 404, "model")
        assert "'tiny', 'also-tiny'" in message


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    check_error(http.get("/v1/nothing"), 404)
    near = {"/chat/completions": "/v1/chat/completions", "/v1/health": "/health", "/v1/chat/completion": CHAT}
    for path, meant in near.items():
        assert f"did you mean {meant}?" in check_error(http.post(path, json={}), 404)
    check_error(http.get(CHAT), 405)
    check_error(http.delete("/health"), 405)


def test_unknown_fields_are_ignored_and_said_once(http: httpx.Client, server: RunningServer) -> None:
    for _ in range(2):
        body = {"prompt": "x", "max_tokens": 1, "quantum_mode": 1}
        assert http.post(TEXT, json=body).status_code == 200
    assert server.stderr.read_text().count("quantum_mode") == 1


def test_a_misspelt_field_is_named_with_the_closest(http: httpx.Client, server: RunningServer) -> None:
    options = {"stream": True, "stream_options": {"include_usages": True}}
    assert http.post(TEXT, json={"prompt": "x", "max_tokens": 1, "temprature": 0, **options}).status_code == 200
    log = server.stderr.read_text()
    assert "'temprature' is unknown and was ignored; did you mean 'temperature'?" in log
    assert "'stream_options.include_usages' is unknown and was ignored" in log
    assert "did you mean 'stream_options.include_usage'?" in log


def test_nested_fields_are_named_too(http: httpx.Client, server: RunningServer) -> None:
    schema = {"schema": {"type": "boolean"}, "name": "x", "strictness": 1}
    form = {"type": "json_schema", "json_schema": schema, "description": "x"}
    assert http.post(CHAT, json={"messages": [USER], "max_tokens": 9, "response_format": form}).status_code == 200
    text = {"format": {"type": "text"}, "verbosity": "low"}
    body = {"input": "x", "max_output_tokens": 1, "text": text, "reasoning": {"effort": None, "sumary": "auto"}}
    assert http.post("/v1/responses", json=body).status_code == 200
    log = server.stderr.read_text()
    for name in ("response_format.json_schema.strictness", "response_format.description", "text.verbosity"):
        assert f"'{name}' is unknown and was ignored" in log
    assert "'reasoning.sumary' is unknown and was ignored" in log


def test_tools_say_once_that_calls_are_not_parsed(http: httpx.Client, server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    for _ in range(2):
        assert http.post(CHAT, json={"messages": [USER], "tools": tools, "max_tokens": 1}).status_code == 200
    assert server.stderr.read_text().count("no tool-call parser is in use") == 1


def test_values_that_ask_for_what_is_done_anyway_are_taken(http: httpx.Client) -> None:
    neutral = {"length_penalty": 1.0, "bad_words": [], "modalities": ["text"], "audio": None, "extra_body": {}}
    neutral |= {"truncation_side": "left", "kv_transfer_params": None, "include_reasoning": True}
    in_chat = {"echo": False, "best_of": 1, "function_call": "auto", "functions": [], "add_special_tokens": False}
    assert http.post(TEXT, json={"prompt": "x", "max_tokens": 1, **neutral}).status_code == 200
    assert http.post(CHAT, json={"messages": [USER], "max_tokens": 1, **neutral, **in_chat}).status_code == 200


def test_a_body_too_large_gets_413(http: httpx.Client) -> None:
    message = check_error(http.post(TEXT, content=b" " * (17 * 1024 * 1024), headers=JSON), 413)
    assert "--max-request-bytes" in message

    def chunks() -> Iterator[bytes]:
        for _ in range(17):
            yield b" " * (1024 * 1024)

    with contextlib.suppress(httpx.WriteError):  # refused while it was still being sent
        check_error(http.post(TEXT, content=chunks(), headers=JSON), 413)


def test_nobody_else_is_hurt(server: RunningServer, http: httpx.Client) -> None:
    """Every bad request again, while a long answer streams: it comes out as if it were alone."""
    fields = {"prompt": "The long one", "max_tokens": 1000, "temperature": 0, "ignore_eos": True, "model": "tiny"}
    alone = server.openai.completions.create(
        model="tiny", prompt="The long one", max_tokens=1000, temperature=0, extra_body={"ignore_eos": True}
    )
    seen: list[str] = []

    def listen() -> None:
        with server.http as client, client.stream("POST", TEXT, json={**fields, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    seen.append(json.loads(line[6:])["choices"][0]["text"])

    thread = threading.Thread(target=listen)
    thread.start()
    for path, body, _ in BAD:
        assert http.post(path, json={"model": "tiny", **body}).status_code == 400
    thread.join(60)
    assert "".join(seen) == alone.choices[0].text


def test_texts_far_beyond_the_context_are_refused_before_they_are_tokenized(http: httpx.Client) -> None:
    text = "a b " * 1_500_000
    for path, body in (
        (TEXT, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
    ):
        started = time.monotonic()
        assert "at least" in check_error(http.post(path, json=body), 400)
        assert time.monotonic() - started < 5
