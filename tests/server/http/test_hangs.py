"""A server whose engine hangs or dies: probes, streams, metrics, signals and exit status are what operators rely on."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import RunningServer, child_processes, has_ended, until

TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 1000, "temperature": 1, "seed": 5, "ignore_eos": True}
POLICY = """
    import time

    from quire.plugins.sched.fcfs import FCFSPolicy

    class Deaf(FCFSPolicy):
        '''It never returns, and nothing can be raised in it.'''

        def schedule(self, view):
            time.sleep(10_000)
"""


def status_of(server: RunningServer) -> int:
    return httpx.get(f"{server.url}/health", timeout=60).status_code


def get_metrics(server: RunningServer) -> str:
    return httpx.get(f"{server.url}/metrics", timeout=60).text


def in_background(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def read_stream(server: RunningServer, started: threading.Event) -> list[str]:
    lines = []
    with httpx.stream("POST", server.url + TEXT, json={**LONG, "stream": True}, timeout=120) as response:
        for line in response.iter_lines():
            lines.append(line)
            started.set()
    return lines


def test_a_stopped_engine_is_replaced(start: Callable[..., RunningServer]) -> None:
    """Then another stops, just before the server is told to end."""
    server = start("--max-num-seqs", "1", "--shutdown-timeout", "3")
    expected = httpx.post(server.url + TEXT, json=LONG, timeout=120).json()["choices"]
    started = threading.Event()
    stream, streamed = in_background(lambda: read_stream(server, started))
    assert started.wait(60)
    waiting, answers = in_background(lambda: httpx.post(server.url + TEXT, json=LONG, timeout=120))
    until(lambda: server.load()["num_requests_waiting"] == 1)
    [engine] = child_processes(server.process.pid)
    os.kill(engine, signal.SIGSTOP)
    until(lambda: status_of(server) == 503, 30)
    refused = httpx.post(server.url + TEXT, json=LONG, timeout=60)
    assert refused.status_code in (200, 503)
    if refused.status_code == 503:
        assert "retry-after" in refused.headers and "hangs" in refused.json()["error"]["message"]
    until(lambda: status_of(server) == 200, 90)
    for thread in (stream, waiting):
        thread.join(120)
    [lines] = streamed
    events = [line for line in lines if line]
    assert '"error"' in events[-2] and "hangs" in events[-2] and events[-1] == "data: [DONE]"
    assert answers[0].status_code == 200 and answers[0].json()["choices"] == expected, "as if nothing had happened"
    assert re.search(r"^quire:engine_restarts_total\{.*\} 1\.0$", get_metrics(server), re.MULTILINE)
    assert has_ended(engine)

    # SIGTERM while it hangs
    [engine] = child_processes(server.process.pid)
    waiting, answers = in_background(lambda: httpx.post(server.url + TEXT, json=LONG, timeout=120))
    until(lambda: server.load()["num_requests_running"] == 1)
    os.kill(engine, signal.SIGSTOP)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert time.monotonic() - begin < 20
    waiting.join(60)
    assert answers[0].status_code in (200, 503)
    until(lambda: has_ended(engine))
    log = server.stderr.read_text()
    assert "is stopped (SIGSTOP" in log and "starting another engine (restart 1)" in log
    assert "Traceback" not in log


def test_an_engine_that_hangs_again_and_again_ends_the_server(start: Callable[..., RunningServer]) -> None:
    server = start("--max-engine-restarts", "1")
    [engine] = child_processes(server.process.pid)
    os.kill(engine, signal.SIGKILL)
    until(lambda: status_of(server) == 503)
    until(lambda: status_of(server) == 200, 90)
    [engine] = child_processes(server.process.pid)
    os.kill(engine, signal.SIGSTOP)
    assert server.process.wait(30) == 1
    assert has_ended(engine)
    assert "--max-engine-restarts 1 (in an hour)" in server.stderr.read_text()


def test_a_policy_that_hangs_is_named_and_left_out(
    start: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deaf_policy.py").write_text(textwrap.dedent(POLICY))
    monkeypatch.syspath_prepend(str(tmp_path))
    server = start("--scheduling-policy", "deaf_policy:Deaf", "--step-timeout", "2")
    answer = httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 2}, timeout=120)
    assert answer.status_code == 200
    log = server.stderr.read_text()
    assert "in policy/deaf_policy:Deaf; starting another engine" in log
    assert "in schedule\n    time.sleep(10_000)" in log
    assert status_of(server) == 200
    metrics = get_metrics(server)
    assert 'kind="policy"' in metrics and 'name="deaf_policy:Deaf"' in metrics and 'reason="hung"' in metrics
