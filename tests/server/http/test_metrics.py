"""What ``/metrics`` says after traffic that is known, as a dashboard made for vLLM reads it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..conftest import RunningServer, start_server, until

PROMPT = list(range(3, 43))  # 40 tokens: two full blocks of 16, of which a second request finds both
OTHER_PROMPT = list(range(103, 143))


def read_metrics(server: RunningServer, prefix: str = "vllm:") -> dict[str, float]:
    """Sums, counts, counters and gauges by name, without labels."""
    with server.http as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
    return {s.name.removeprefix(prefix): s.value for s in samples if s.name.startswith(prefix) and "le" not in s.labels}


def complete(server: RunningServer, **body: object) -> dict:
    with server.http as client:
        response = client.post("/v1/completions", json={"temperature": 0, "ignore_eos": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def small_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A KV cache of 160 tokens, in 10 blocks."""
    flags = ("--served-model-name", "tiny", "--max-model-len", "128", "--num-gpu-blocks-override", "11")
    server = start_server(tmp_path_factory.mktemp("metrics"), tiny_model, *flags)
    yield server
    server.stop()


@pytest.fixture
def added(small_server: RunningServer) -> Callable[[], dict[str, float]]:
    """By how much each value has grown since the test began."""
    before = defaultdict(float, read_metrics(small_server))
    return lambda: {name: value - before[name] for name, value in read_metrics(small_server).items()}


def test_metrics_of_known_traffic(small_server: RunningServer, added: Callable[[], dict[str, float]]) -> None:
    complete(small_server, prompt=PROMPT, max_tokens=5)
    complete(small_server, prompt=PROMPT, max_tokens=7)
    complete(small_server, prompt=[50, 51, 52], n=3, max_tokens=500)  # ends at the context
    until(lambda: read_metrics(small_server)["kv_cache_usage_perc"] == 0)
    gauges, found = read_metrics(small_server), added()
    assert gauges == read_metrics(small_server, "quire:")
    assert gauges["kv_cache_size_tokens"] == 160
    assert gauges["cpu_cache_usage_perc"] == gauges["num_requests_swapped"] == 0
    expected = {
        "request_params_n_count": 3,
        "request_params_n_sum": 1 + 1 + 3,
        "request_params_max_tokens_count": 5,
        "request_params_max_tokens_sum": 5 + 7 + 3 * 125,
        "request_max_num_generation_tokens_count": 3,
        "request_max_num_generation_tokens_sum": 5 + 7 + 125,
        "request_generation_tokens_sum": 5 + 7 + 3 * 125,
        "request_prefill_time_seconds_count": 5,
        "request_decode_time_seconds_count": 5,
        "request_inference_time_seconds_count": 5,
        "request_num_preemptions_count": 5,
        "request_num_preemptions_sum": found["num_preemptions_total"],
        "iteration_tokens_total_count": found["steps_total"],
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    # The times of a request are parts of its whole time, and what is left is queueing and messages.
    inference = found["request_inference_time_seconds_sum"]
    assert inference == pytest.approx(
        found["request_prefill_time_seconds_sum"] + found["request_decode_time_seconds_sum"]
    )
    assert 0 < inference + found["request_queue_time_seconds_sum"] <= found["e2e_request_latency_seconds_sum"] + 0.1
    with small_server.http as client:
        text = client.get("/metrics").text
    [info] = [line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")]
    assert all(label in info for label in ('block_size="16"', 'num_gpu_blocks="11"', 'kv_cache_size_tokens="160"'))


def test_steps_count_each_computed_token_once(
    small_server: RunningServer, added: Callable[[], dict[str, float]]
) -> None:
    """A prompt is computed once and each token but the last is fed back; what is cached is not computed."""
    complete(small_server, prompt=OTHER_PROMPT, max_tokens=5)
    until(lambda: added()["steps_total"] >= 5)
    assert added()["iteration_tokens_total_sum"] == 40 + 4
    complete(small_server, prompt=OTHER_PROMPT, max_tokens=5)
    until(lambda: added()["steps_total"] >= 10)
    found = added()
    assert found["iteration_tokens_total_sum"] == 40 + 4 + (40 - 32) + 4
    assert found["request_prefill_kv_computed_tokens_sum"] == 40 + 8
    assert found["prefix_cache_hits_total"] == 32 and found["prefix_cache_queries_total"] >= 40
    whole = read_metrics(small_server)
    rate = whole["prefix_cache_hits_total"] / whole["prefix_cache_queries_total"]
    assert whole["gpu_prefix_cache_hit_rate"] == whole["cpu_prefix_cache_hit_rate"] == pytest.approx(rate)


def test_preemptions_are_counted_by_request(small_server: RunningServer, added: Callable[[], dict[str, float]]) -> None:
    """Two requests of 110 tokens do not fit beside each other into 160: one is preempted and recomputed."""
    clients = [
        threading.Thread(target=complete, args=(small_server,), kwargs={"prompt": [first, 4, 5], "max_tokens": 107})
        for first in (60, 70)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    found = added()
    assert found["request_num_preemptions_count"] == 2
    assert found["request_num_preemptions_sum"] == found["num_preemptions_total"] >= 1


def test_a_request_that_ends_before_its_first_token_has_no_phases(small_server: RunningServer) -> None:
    with small_server.http as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 80, "ignore_eos": True}, timeout=1e-3)
    until(lambda: read_metrics(small_server)["num_requests_running"] == 0)
    found = read_metrics(small_server)
    assert found["request_prefill_time_seconds_count"] == found["request_decode_time_seconds_count"]


def read_http_metrics(server: RunningServer) -> dict[tuple[str, ...], float]:
    """By name, handler, method and status."""
    with server.http as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
    labels = ("handler", "method", "status", "le")
    found = [s for s in samples if s.name.startswith(("http_", "process_"))]
    return {(s.name, *(s.labels[name] for name in labels if name in s.labels)): s.value for s in found}


def test_requests_are_counted_by_route_method_and_status(small_server: RunningServer) -> None:
    before = defaultdict(float, read_http_metrics(small_server))
    path = "/v1/completions"
    complete(small_server, prompt=PROMPT, max_tokens=2)
    with small_server.http as client:
        client.post(path, json={"prompt": PROMPT, "max_tokens": "many"})
        client.get("/v1/models/tiny")
        client.head("/v1/models")
        for method in ("PROPFIND", "MKCOL"):
            client.get(f"/nowhere/{method}")
            client.request(method, f"/nowhere/{method}")
        client.get("/health")
        with client.stream("POST", path, json={"prompt": PROMPT, "max_tokens": 2, "stream": True}) as response:
            response.read()
    after = read_http_metrics(small_server)
    added = {key: value - before[key] for key, value in after.items() if value != before[key]}
    total, seconds = "http_requests_total", "http_request_duration_seconds_count"
    assert {key[1:]: value for key, value in added.items() if key[0] == total} == {
        (path, "POST", "2xx"): 2,
        (path, "POST", "4xx"): 1,
        ("/v1/models/{name:path}", "GET", "2xx"): 1,
        ("/v1/models", "HEAD", "2xx"): 1,
        ("none", "GET", "4xx"): 2,
        ("none", "other", "4xx"): 2,
    }
    assert added[seconds, path, "POST"] == 3 == added["http_request_duration_seconds_bucket", path, "POST", "+Inf"]
    assert added["http_request_duration_seconds_sum", path, "POST"] > 0


def test_the_process_of_the_server_is_described(small_server: RunningServer) -> None:
    figures = read_http_metrics(small_server)
    assert figures[("process_resident_memory_bytes",)] > 10**7 and figures[("process_open_fds",)] > 3
    assert figures[("process_cpu_seconds_total",)] > 0 and figures[("process_start_time_seconds",)] > 10**9
