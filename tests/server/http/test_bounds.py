"""The work that one body can ask for is bounded, and while it is done the event loop answers others."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.core.engine.async_llm import AsyncLLM
from quire.core.testing.tiny_models import make_tiny_model
from quire.server.http.app import create_app
from quire.server.http.protocol.reading import MAX_NODES, MAX_VALUES

from ..conftest import RunningServer, check_error, start_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
CONTEXT = 32_768


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("bounds") / "tiny", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def http(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server: RunningServer = start_server(tmp_path_factory.mktemp("server"), str(model))
    with server.http as client:
        yield client
    server.stop()


def post(http: httpx.Client, path: str, data: str) -> httpx.Response:
    return http.post(path, content=data.encode(), headers=JSON)


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize", "/invocations"])
@pytest.mark.parametrize(
    ("value", "word"),
    [
        (f"[{'1,' * MAX_VALUES}1,1]", "values"),
        (f"[{'[],' * MAX_NODES}1]", "objects"),
        ("{" + ",".join(f'"{i}":1' for i in range(MAX_NODES)) + "}", "objects"),
        ('["\\\\",' + "[]," * MAX_NODES + "1]", "objects"),  # a string that ends in a backslash
        ('["",' * MAX_NODES + "1" + "]" * MAX_NODES, "objects"),
    ],
    ids=["numbers", "lists", "fields", "behind a backslash", "nested"],
)
def test_bodies_of_too_many_values_are_refused_before_they_are_parsed(
    http: httpx.Client, path: str, value: str, word: str
) -> None:
    message = check_error(post(http, path, f'{{"x": {value}}}'), 400)
    assert f"more than {MAX_VALUES if word == 'values' else MAX_NODES} {word}" in message


@pytest.mark.parametrize("unit", ["a,b:[{", '\\",[', "\\\\,", '\\\\\\",'])
def test_what_stands_in_a_text_is_not_counted(http: httpx.Client, unit: str) -> None:
    body = f'{{"user": "{unit * 600_000}", "prompt": [1, "x"]}}'
    assert "not a token id" in check_error(post(http, TEXT, body), 400, "prompt")


def test_prompt_tokens_of_all_sequences_together_are_bounded(http: httpx.Client) -> None:
    """0.3 MB would keep 4.2 million tokens, and compute as many where the sequences are preempted."""
    ids = [5] * (CONTEXT - 8)
    message = check_error(http.post(TEXT, json={"prompt": ids, "n": 128, "max_tokens": 8}), 400, "n")
    assert "are 4193280 prompt tokens, the limit is 2000000" in message
    conversation = [{"role": "user", "content": "a b " * 8000}]
    body = {"messages": conversation, "n": 128, "truncate_prompt_tokens": -1, "max_tokens": 8}
    assert "prompt tokens, the limit is" in check_error(http.post(CHAT, json=body), 400, "n")


def test_stop_strings_of_all_prompts_together_are_bounded(http: httpx.Client) -> None:
    body = {"prompt": ["x"] * 64, "stop": ["a" * 4096] * 32}
    assert "for each of 64 prompts" in check_error(http.post(TEXT, json=body), 400, "stop")


HEAVY: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "token ids": (TEXT, lambda: {"prompt": [[5] * 480] * 1024, "max_tokens": 1}),
    "short prompts": (TEXT, lambda: {"prompt": ["x"] * 1024, "max_tokens": 1}),
    "texts": (TEXT, lambda: {"prompt": ["hello, world " * 1000] * 512, "max_tokens": 1}),
    "long text": (TEXT, lambda: {"prompt": "hello, world " * 1_200_000}),
    "messages": (CHAT, lambda: {"messages": [{"role": "user", "content": "hello " * 20}] * 4096, "n": 128}),
    "long message": (CHAT, lambda: {"messages": [{"role": "user", "content": "hello, world " * 1_200_000}]}),
    "token names": ("/tokenize", lambda: {"prompt": "hello " * 10_000, "return_token_strs": True}),
    "tokens": ("/detokenize", lambda: {"tokens": [5] * 500_000}),
    "dense": (TEXT, lambda: {"prompt": "x", "y": [[]] * 4_000_000}),
}


def test_the_event_loop_answers_others_meanwhile(model: Path) -> None:
    """Time is that of the loop's thread, so that neither other processes nor threads are measured."""
    bodies = {name: (path, json.dumps(make()).encode()) for name, (path, make) in HEAVY.items()}
    longest: dict[str, float] = {}

    async def beat(name: str) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest[name] = max(longest.get(name, 0.0), now - last)
            last = time.thread_time()

    async def scenario() -> None:
        engine = AsyncLLM(model=str(model), device="cpu", attention_backend="torch_sdpa", num_gpu_blocks_override=4096)
        await engine.start()
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=120) as http:
            await http.post(TEXT, json={"prompt": "x", "max_tokens": 1})  # imports what the first request needs
            for name, (path, data) in bodies.items():
                ticking = asyncio.create_task(beat(name))
                response = await http.post(path, content=data, headers=JSON)
                assert response.status_code in (200, 400, 429), response.text
                ticking.cancel()
        await engine.shutdown()

    gc.collect()
    gc.freeze()  # as the server does: else a collection looks at all that this process imported
    asyncio.run(scenario())
    assert max(longest.values()) < 0.25, longest  # some 30 ms on an idle machine


def test_a_thousand_clients_at_once_lose_nothing_on_a_default_server(http: httpx.Client) -> None:
    async def scenario() -> list[int]:
        limits = httpx.Limits(max_connections=1024, max_keepalive_connections=1024)
        async with httpx.AsyncClient(base_url=http.base_url, limits=limits, timeout=300) as client:
            body = {"prompt": "x", "max_tokens": 1}
            responses = await asyncio.gather(*(client.post(TEXT, json=body) for _ in range(1024)))
        return [response.status_code for response in responses]

    assert asyncio.run(scenario()) == [200] * 1024


def test_the_queue_of_a_server_is_bounded_by_default(start: Callable[..., RunningServer]) -> None:
    """16 requests wait for each that may run."""
    with start("--max-num-seqs", "1").http as client:
        response = client.post(TEXT, json={"prompt": ["x"] * 40, "max_tokens": 50, "ignore_eos": True})
        assert "max_num_queued_requests=16" in check_error(response, 429)
        assert client.post(TEXT, json={"prompt": ["x"] * 16, "max_tokens": 1}).status_code == 200
