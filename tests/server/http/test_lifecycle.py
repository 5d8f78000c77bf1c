"""Starting, refusing to start, guarding, draining and stopping."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from quire.core.env import child_environment
from quire.server.cli.main import main
from quire.server.http.serving import drain_requests
from quire.server.http.settings import ServerSettings
from quire.server.http.state import ServerState

from ..conftest import RunningServer, child_processes, until

TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 1000, "temperature": 0, "ignore_eos": True}


def test_key_queue_limit_and_drain(start: Callable[..., RunningServer]) -> None:
    """One more server, with what the shared one has not."""
    words = "--api-key k1 --api-key k2 --max_num_seqs 1 --max-num-queued-requests 1 --enable-log-requests"
    server = start(*words.split(), *["--prometheus-port", "0", "--swap-space", "4", "--max-request-bytes", "1000"])
    with httpx.Client(base_url=server.url, timeout=60) as client:
        _keys(server, client)
        client.headers["Authorization"] = "Bearer k1"
        assert client.post(TEXT, json={"prompt": "x" * 2000}).status_code == 413
        [metrics] = re.findall(r"Metrics also on (http://\S+)", server.stdout.read_text())
        assert "vllm:num_requests_running" in httpx.get(metrics).text
        _queue_limit(server, client)
        _drains(server, client)
    log = server.stderr.read_text()
    assert '"POST /v1/completions HTTP/1.1" 429' in log
    assert "--max_num_seqs: now written --max-num-seqs" in log and "--swap-space 4: no longer needed" in log
    assert "Traceback" not in log


def _keys(server: RunningServer, client: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer k3"}, {"Authorization": "Bearer"}, {"Authorization": "k1"}):
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/invocations", json={"prompt": "x"}, headers=headers).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer k2"}).status_code == 200
    page = {"Authorization": "Bearer k2", "Origin": "https://ui.example"}
    answer = client.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=page)
    assert answer.status_code == 200, "a page that knows the key may ask"
    assert client.get("/health").status_code == 200, "probes need no key"
    with pytest.raises(openai.AuthenticationError):
        server.openai.models.list()


def _queue_limit(server: RunningServer, client: httpx.Client) -> None:
    """One runs, one waits, the third is told to come back; the two are unhurt."""
    assert client.post(TEXT, json={"prompt": "x", "max_tokens": 1, "n": 2}).status_code == 200, "no request waits yet"
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(client.post(TEXT, json=LONG))) for _ in range(2)]
    threads[0].start()
    until(lambda: client.get("/load").json()["num_requests_running"] == 1)
    threads[1].start()
    until(lambda: client.get("/load").json()["num_requests_waiting"] == 1)
    for stream in (False, True):
        refused = client.post(TEXT, json={**LONG, "stream": stream})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [1000, 1000]


def _drains(server: RunningServer, client: httpx.Client) -> None:
    """SIGTERM: what runs is finished, what comes is refused, then the process ends with status 0."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.post(TEXT, json=LONG)))
    thread.start()
    until(lambda: client.get("/load").json()["num_requests_running"] == 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: client.get("/health").status_code == 503)
    late = client.post(TEXT, json={"prompt": "x"})
    assert late.status_code == 503 and "retry-after" in late.headers
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 1000
    assert server.process.wait(30) == 0


def test_keys_are_asked_for_below_the_root_path(start: Callable[..., RunningServer]) -> None:
    """Whether the proxy cuts the prefix off or not, and however often a client writes it."""
    server = start("--root-path", "/llm/", "--api-key", "k", "--admin-api-key", "a")
    with server.http as client:
        for root in ("", "/llm", "/llm/llm"):
            is_served = root != "/llm/llm"
            for key, path in (("k", "/v1/models"), ("a", "/admin/policy")):
                assert client.get(root + path).status_code == (401 if is_served else 404)
                answer = client.get(root + path, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == (200 if is_served else 404)
            assert client.post(root + "/invocations", json={"prompt": "x"}).status_code == (401 if is_served else 404)
            assert client.get(root + "/health").status_code == (200 if is_served else 404)
        assert client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert "/llm/openapi.json" in client.get("/docs").text
    assert "Warning" not in server.stderr.read_text()


def test_a_server_whose_engine_dies_ends(start: Callable[..., RunningServer]) -> None:
    """Who was being answered is told, and the supervisor sees status 1, where no other engine is to be started."""
    server = start("--on-hang", "exit")
    lines: list[str] = []

    def listen() -> None:
        try:
            with httpx.stream("POST", server.url + TEXT, json={**LONG, "stream": True}, timeout=60) as response:
                lines.extend(response.iter_lines())
        except httpx.HTTPError as error:
            lines.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: server.load()["num_requests_running"] == 1)
    [engine] = child_processes(server.process.pid)
    os.kill(engine, signal.SIGKILL)
    assert server.process.wait(30) == 1
    thread.join()
    assert any("error" in line or "closed" in line or "peer" in line for line in lines[-5:])
    assert "the engine process ended with status -9" in server.stderr.read_text()


def test_draining_ends_with_the_last_request_the_time_limit_or_a_second_signal() -> None:
    async def drained(timeout: float, event: Callable[[ServerState, asyncio.Queue[int]], None]) -> float:
        state = ServerState(None, ServerSettings(shutdown_timeout=timeout))  # type: ignore[arg-type]
        signalled: asyncio.Queue[int] = asyncio.Queue()
        state.begin_request(True)
        start = time.monotonic()
        asyncio.get_running_loop().call_later(0.05, event, state, signalled)
        await drain_requests(state, signalled)
        assert state.draining
        return time.monotonic() - start

    assert asyncio.run(drained(30, lambda state, signalled: state.end_request(True))) < 5
    assert asyncio.run(drained(30, lambda state, signalled: signalled.put_nowait(2))) < 5
    assert 0.1 < asyncio.run(drained(0.1, lambda state, signalled: None)) < 5


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quire: ")]
    assert len(lines) == 1 and lines[0].startswith("quire: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], ["/nowhere/at/all"]),
        (["MODEL", "--attention-backend", "tritn"], ["tritn", "did you mean triton"]),
        (["MODEL", "--scheduler", "priorty"], ["priorty", "did you mean priority"]),
        (["MODEL", "--kv-allocator", "pages"], ["pages", "paged"]),
        (["MODEL", "--metrics", "prometeus"], ["prometeus", "did you mean prometheus"]),
        (["MODEL", "--logits-processor", "no.such:Thing"], ["no.such:Thing"]),
        (["MODEL", "--plugin", "no-such-dist"], ["no-such-dist"]),
        (["MODEL", "--scheduling-policy-option", "x=1"], ["x"]),
        (["MODEL", "--scheduling-policy-option", "x"], ["key=value"]),
        (["MODEL", "--max-model-len", "100000"], ["100000", "2048"]),
        (["MODEL", "--max-model-len", "0"], ["2048"]),
        (["MODEL", "--trust-remote-code"], ["never runs code"]),
        (["MODEL", "--tensor-parallel-size", "3"], ["tensor_parallel_size", "3"]),
        (["MODEL", "--pipeline-parallel-size", "300"], ["pipeline_parallel_size", "300", "layers"]),
        (["MODEL", "--device", "cuda"], ["cuda"]),
        (["MODEL", "--block-size", "0"], ["block_size"]),
        (["MODEL", "--max-num-seqs", "0"], ["max_num_seqs"]),
        (["MODEL", "--gpu-memory-utilization", "1.5"], ["gpu_memory_utilization"]),
        (["MODEL", "--quantization", "awk"], ["awk"]),
        (["MODEL", "--chat-template", "/no/template.jinja"], ["/no/template.jinja"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refusals_before_anything_is_loaded(
    arguments: list[str], words: list[str], tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [tiny_model if word == "MODEL" else word for word in arguments]
    assert main(["serve", *command, "--port", "0"]) == 2
    message = one_line(capsys)
    assert all(word in message for word in words), message


def test_a_context_that_does_not_fit_the_cache(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine process refuses, says the largest context that fits, and the command line passes it on."""
    assert main(["serve", tiny_model, "--port", "0", "--num-gpu-blocks-override", "11"]) == 2
    message = one_line(capsys)
    assert "2048" in message and "160" in message
    assert "--max-model-len" in message and "--gpu-memory-utilization" in message, "the flags that would mend it"


def test_a_broken_checkpoint(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in Path(tiny_model).iterdir():
        data = source.read_bytes()
        (tmp_path / source.name).write_bytes(data[: len(data) // 2] if source.suffix == ".safetensors" else data)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "model.safetensors" in one_line(capsys)


def test_the_exit_status_and_the_line_of_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quire", "serve", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("quire: error: ") and "Traceback" not in done.stderr
