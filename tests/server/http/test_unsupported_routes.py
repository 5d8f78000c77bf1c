"""Routes of OpenAI's API and of vLLM's server that Quire lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from ..conftest import RunningServer, check_error


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


UNSUPPORTED = [
    *(
        "/v1/responses/resp_1/cancel",
        "/v1/responses/resp_1/input_items",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
    ),
    *("/v1/score", "/score", "/pooling", "/classify", "/v1/moderations", "/v1/audio", "/v1/audio/speech"),
    *("/v1/audio/transcriptions", "/v1/images", "/v1/images/generations", "/v1/videos", "/v1/realtime", "/v1/files"),
    *("/v1/files/f/content", "/v1/uploads", "/v1/batches", "/v1/vector_stores", "/v1/conversations", "/v1/assistants"),
    *("/v1/threads", "/v1/threads/t/runs", "/v1/fine_tuning", "/v1/fine_tuning/jobs", "/v1/evals"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions/chatcmpl-1"),
    *("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/reset_prefix_cache", "/reset_mm_cache"),
    *("/collective_rpc", "/server_info", "/tokenizer_info", "/start_profile", "/stop_profile", "/scale_elastic_ep"),
    *("/is_scaling_elastic_ep", "/generate", "/inference/v1/generate"),
]


def test_the_openai_sdk_is_told_what_is_not_supported(server: RunningServer) -> None:
    """With 400, which is about the request: a gateway that sees 404 takes the model out of service."""
    client = server.openai
    calls: list[Callable[[], object]] = [
        lambda: client.embeddings.create(model="tiny", input="x"),
        lambda: client.moderations.create(input="x"),
        lambda: client.files.list(),
        lambda: client.chat.completions.retrieve("chatcmpl-1"),
        lambda: client.chat.completions.delete("chatcmpl-1"),
        lambda: client.models.delete("tiny"),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match="not supported"):
            call()


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_a_route_that_quire_lacks_is_not_supported(http: httpx.Client, path: str) -> None:
    for response in (http.get(path), http.post(path, json={"model": "tiny", "input": "x"}), http.delete(path)):
        assert "is not supported" in check_error(response, 400)
        assert response.json()["error"]["code"] == "unsupported"
    assert path not in http.get("/openapi.json").json()["paths"]
