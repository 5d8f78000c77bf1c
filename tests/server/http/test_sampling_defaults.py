"""Requests that say nothing are sampled as the model's ``generation_config.json`` or the operator wants."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from ..conftest import RunningServer

DEFAULTS = '{"temperature": 2.0, "top_k": 1, "max_new_tokens": 5}'


def test_silent_requests_get_the_defaults_and_others_what_they_say(start: Callable[..., RunningServer]) -> None:
    server = start("--served-model-name", "tiny", "--override-generation-config", DEFAULTS)

    def complete(path: str = "/v1/completions", **fields: object) -> tuple[list[str], int]:
        body = {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
        response = httpx.post(server.url + path, json={**body, "ignore_eos": True, **fields}, timeout=60)
        answer = response.raise_for_status().json()
        choices = [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
        return choices, answer["usage"]["completion_tokens"]

    greedy = complete(temperature=0, max_tokens=5)
    assert complete() == complete(temperature=None, top_k=None) == greedy
    assert complete(max_tokens=7)[1] == 7
    assert len(set(complete(n=4, top_k=0)[0])) > 1
    chat = complete("/v1/chat/completions")
    assert chat == complete("/v1/chat/completions", temperature=0, max_tokens=5)
    assert "sampling defaults of requests: temperature 2.0, top_k 1" in server.stderr.read_text()
