"""A server ends on SIGTERM and Ctrl-C at any time, and leaves no process, no file and no client without an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from quire.core.engine.process import EngineProcess
from quire.core.env import child_environment

from ..conftest import RunningServer, child_processes, has_ended, until

TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}

SWALLOWS_EXCEPTIONS = """
import os, signal, sys, time
from quire.server.http.signals import StopSignals

class Signalled:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)

with StopSignals() as signals:
    signals.call_before_exit(lambda: print("cleaned up", flush=True))
    Signalled()  # an exception inside __del__ is printed and forgotten, as inside many callbacks of C code
    time.sleep(90)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_start_also_where_exceptions_are_swallowed(number: int) -> None:
    command = [sys.executable, "-c", SWALLOWS_EXCEPTIONS, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=60)
    assert done.returncode == 128 + number
    assert done.stdout == "cleaned up\n"
    assert done.stderr == f"quire: ended by {signal.Signals(number).name} while starting\n"


@pytest.fixture
def starting(tiny_model: str, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Begin to start a server, whose log is ``log`` in ``tmp_path``."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "quire", "serve", tiny_model, "--port", "0"]
        with (tmp_path / "log").open("w") as log:
            begun.append(subprocess.Popen(command, env=child_environment(), stdout=log, stderr=log))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_end_during_the_first_imports_leaves_no_process(
    number: int, status: int, starting: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The engine's process is there before anything heavy is imported."""
    process = starting()
    until(lambda: bool(child_processes(process.pid)))
    _end_and_check(process, number, status, tmp_path / "log")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_while_the_model_loads_leaves_no_process(
    number: int, status: int, starting: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = starting()
    until(lambda: "model: LlamaForCausalLM" in (tmp_path / "log").read_text(), 60)
    _end_and_check(process, number, status, tmp_path / "log")


def _end_and_check(process: subprocess.Popen[bytes], number: int, status: int, log: Path) -> None:
    [engine] = child_processes(process.pid)
    folder = _socket_folder(engine)
    process.send_signal(number)
    assert process.wait(30) == status
    until(lambda: has_ended(engine), 30)
    until(lambda: not folder.exists())
    assert "Traceback" not in log.read_text() and "ready on" not in log.read_text()


def test_the_engines_process_ignores_signals_from_its_first_moment() -> None:
    """Ctrl-C in a terminal reaches it while Python itself still starts; its parent decides when it ends."""
    process = EngineProcess("cpu")
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        ignored = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1
        status = Path(f"/proc/{process.pid}/status")
        until(lambda: int(re.findall(r"SigIgn:\s*(\w+)", status.read_text())[0], 16) & ignored == ignored)
        assert process.exit_status is None
        assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        process.kill()


def test_a_benchmark_that_is_ended_stops_its_server(tiny_model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quire", "bench", "startup", tiny_model]
    environment = {**child_environment(), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: bool(child_processes(process.pid)), 30)
            [server] = child_processes(process.pid)
            until(lambda: bool(child_processes(server)), 30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
            assert has_ended(server)
            until(lambda: not list(tmp_path.iterdir()))
            assert process.stderr is not None and b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_nothing_is_left_of_a_server_that_is_killed(start: Callable[..., RunningServer]) -> None:
    """Not even if its engine is killed with it: the folder of the sockets is gone once both ends are connected."""
    server = start()
    [engine] = child_processes(server.process.pid)
    folder = _socket_folder(engine)
    assert folder.name.startswith("quire-") and not folder.exists()
    server.process.kill()
    until(lambda: has_ended(engine))


def _socket_folder(engine: int) -> Path:
    """Once the new process has become ours, from its command line."""
    until(lambda: "/quire-" in Path(f"/proc/{engine}/cmdline").read_text())
    words = Path(f"/proc/{engine}/cmdline").read_text().split("\0")
    [folder] = [word for word in words if Path(word).name.startswith("quire-")]
    return Path(folder)


def test_a_second_signal_ends_at_once_and_clients_get_an_error(start: Callable[..., RunningServer]) -> None:
    """Whether they wait for an answer, read a stream, or have not sent all of their request."""
    server = start()
    answers: list[httpx.Response] = []
    streamed: list[str] = []
    half, ended = threading.Event(), threading.Event()

    def half_a_body() -> Iterator[bytes]:
        yield b'{"prompt": '
        half.set()
        ended.wait(60)
        yield b'"x"}'

    def read_stream() -> None:
        with httpx.stream("POST", server.url + TEXT, json={**LONG, "stream": True}, timeout=60) as response:
            streamed.extend(response.iter_lines())

    def post_half() -> None:
        headers = {"content-type": "application/json"}
        answers.append(httpx.post(server.url + TEXT, content=half_a_body(), headers=headers, timeout=60))

    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(server.url + TEXT, json=LONG, timeout=60))),
        threading.Thread(target=read_stream),
        threading.Thread(target=post_half),
    ]
    for thread in threads:
        thread.start()
    until(lambda: server.load()["num_requests_running"] == 2 and half.is_set())
    begin = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    until(lambda: "draining" in server.stderr.read_text())
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert time.monotonic() - begin < 10
    ended.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [503, 503]
    for answer in answers:
        assert answer.json()["error"]["type"] == "service_unavailable_error"
    [event] = [line for line in streamed if '"error"' in line]
    assert json.loads(event.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in server.stderr.read_text()
