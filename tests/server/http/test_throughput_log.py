"""The line of throughput in the server's log."""

from __future__ import annotations

import re
from collections.abc import Callable

from quire.server.http.throughput_log import ThroughputLog

from ..conftest import RunningServer, until

LINE = re.compile(
    r"INFO \S+ quire\.stats: Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, "
    r"Running: (\d+) reqs, Waiting: (\d+) reqs, GPU KV cache usage: ([\d.]+)%, Prefix cache hit rate: ([\d.]+)%"
)


def test_a_server_logs_its_throughput_while_there_is_traffic(start: Callable[..., RunningServer]) -> None:
    """As vLLM's does, every ten seconds; not with ``--disable-log-stats``."""
    server, silent = start(), start("--disable-log-stats")
    body = {"prompt": "one two three", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    for each in (silent, server):
        with each.http as client:
            usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]

    def count_tokens(group: int) -> float:
        return sum(10 * float(match[group]) for match in LINE.finditer(server.stderr.read_text()))

    until(lambda: count_tokens(2) > 390, 60)  # in one line or in two
    assert abs(count_tokens(2) - 400) < 10 and abs(count_tokens(1) - usage["prompt_tokens"]) < 2
    last = LINE.findall(server.stderr.read_text())[-1]
    assert last[2:4] == ("0", "0") and float(last[4]) < 1
    log = silent.stderr.read_text()
    assert "throughput" not in log and "disable-log-stats" not in log, "the flag means what it says"


def test_what_a_line_says() -> None:
    stats = {
        "num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0,
        "prompt_tokens_total": 0.0, "generation_tokens_total": 0.0,
        "prefix_cache_queries_total": 0.0, "prefix_cache_hits_total": 0.0,
    }  # fmt: skip
    log = ThroughputLog(stats, 100.0)
    assert log.make_line(stats, 110.0) is None, "idle since the start"
    busy = {
        **stats, "num_requests_running": 3.0, "num_requests_waiting": 2.0, "kv_cache_usage_perc": 0.256,
        "prompt_tokens_total": 500.0, "generation_tokens_total": 1250.0,
        "prefix_cache_queries_total": 500.0, "prefix_cache_hits_total": 125.0,
    }  # fmt: skip
    assert log.make_line(busy, 120.0) == (
        "Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 125.0 tokens/s, Running: 3 reqs, "
        "Waiting: 2 reqs, GPU KV cache usage: 25.6%, Prefix cache hit rate: 25.0%"
    )
    stuck = log.make_line(busy, 130.0)
    assert stuck is not None and "generation throughput: 0.0 tokens/s, Running: 3 reqs" in stuck, "a hang is seen"
    assert "hit rate: 25.0%" in stuck, "nothing was looked up since"
    drafts = {
        "spec_decode_num_drafts_total": 10.0, "spec_decode_num_draft_tokens_total": 40.0,
        "spec_decode_num_accepted_tokens_total": 25.0,
    }  # fmt: skip
    idle = {**busy, **drafts, "num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}
    line = log.make_line({**idle, "generation_tokens_total": 1260.0}, 140.0)
    assert line is not None and line.endswith("Mean acceptance length: 3.50, Avg draft acceptance rate: 62.5%")
    idle["generation_tokens_total"] = 1260.0
    last = log.make_line(idle, 150.0)
    assert last is not None and "throughput: 0.0 tokens/s, Running: 0 reqs" in last, "one line says that it is idle"
    assert log.make_line(idle, 160.0) is None and log.make_line(idle, 170.0) is None
    restarted = log.make_line({**stats, "generation_tokens_total": 50.0}, 180.0)
    assert restarted is not None and "generation throughput: 5.0 tokens/s" in restarted, "another engine counts from 0"
