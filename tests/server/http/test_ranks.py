"""A server on two ranks: whatever ends one of them, a line names it, callers hear of it, and no process is left."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import RunningServer, child_processes, has_ended, until

pytestmark = pytest.mark.parallel

TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 600, "temperature": 1, "seed": 5, "ignore_eos": True}
TWO = ("--tensor-parallel-size", "2", "--device", "cpu", "--step-timeout", "4")


def find_ranks(server: RunningServer) -> list[int]:
    """Their processes, by rank. They are children of a thread of the engine core."""
    [engine] = child_processes(server.process.pid)
    ranks = {}
    for children in Path(f"/proc/{engine}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if any(word.endswith("rank_main") for word in words):
                ranks[int(words[words.index("-m") + 2])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def begin_request(server: RunningServer) -> tuple[threading.Thread, list[Any]]:
    """Ask for many tokens in another thread; returns when the request runs."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(httpx.post(server.url + TEXT, json=LONG, timeout=180))
        except httpx.HTTPError as error:  # the server was killed
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    until(lambda: server.load()["num_requests_running"] == 1, 60)
    return thread, answers


def error_lines(server: RunningServer) -> list[str]:
    """But for the one that says that the server ends."""
    lines = [line for line in server.stderr.read_text().splitlines() if re.match("ERROR|Traceback|.*Error:", line)]
    return [line for line in lines if not line.endswith("the engine hung or died; the server ends")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "reason", "seconds"),
    [
        (signal.SIGKILL, "was killed by SIGKILL", 20),
        (signal.SIGSEGV, "was killed by SIGSEGV", 20),
        (signal.SIGSTOP, r"is stopped \(SIGSTOP, or a debugger\)", 40),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_rank_that_ends_is_named(
    start: Callable[..., RunningServer], rank: int, number: signal.Signals, reason: str, seconds: float
) -> None:
    server = start(*TWO, "--on-hang", "exit")
    [engine], ranks = child_processes(server.process.pid), find_ranks(server)
    assert len(ranks) == 2
    waiting, answers = begin_request(server)
    os.kill(ranks[rank], number)
    begin = time.monotonic()
    assert server.process.wait(60) == 1
    assert time.monotonic() - begin < seconds
    waiting.join(10)
    assert answers[0].status_code == 503 and "rank" in answers[0].json()["error"]["message"]
    until(lambda: all(has_ended(pid) for pid in (engine, *ranks)))
    [line] = error_lines(server)
    assert re.search(rf"rank {rank} \(process {ranks[rank]}\) {reason}", line)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_another_engine_has_ranks_of_its_own(start: Callable[..., RunningServer], kind: str) -> None:
    """And answers the request that was running."""
    server = start(*TWO) if kind == "tensor" else start("-pp", *TWO[1:])
    expected = httpx.post(server.url + TEXT, json=LONG, timeout=180).json()["choices"]
    ranks = find_ranks(server)
    waiting, answers = begin_request(server)
    os.kill(ranks[1], signal.SIGKILL)
    waiting.join(180)
    assert answers[0].json()["choices"] == expected
    assert all(has_ended(pid) for pid in ranks) and len(find_ranks(server)) == 2
    [line] = error_lines(server)
    stage = "stage 1, " if kind == "pipeline" else ""
    assert f"rank 1 ({stage}process {ranks[1]})" in line and "starting another engine (restart 1)" in line
    replaced = find_ranks(server)
    assert server.stop() == 0
    until(lambda: all(has_ended(pid) for pid in replaced))


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_ranks_end_with_what_started_them(start: Callable[..., RunningServer], victim: str) -> None:
    before = set(os.listdir("/dev/shm"))
    server = start(*TWO, "--on-hang", "exit")
    [engine], ranks = child_processes(server.process.pid), find_ranks(server)
    begin_request(server)
    os.kill(ranks[0], signal.SIGSTOP)  # one that cannot look
    os.kill(server.process.pid if victim == "server" else engine, signal.SIGKILL)
    until(lambda: all(has_ended(pid) for pid in (engine, *ranks)))
    server.process.wait(30)
    assert not set(os.listdir("/dev/shm")) - before


def test_a_rank_that_cannot_start_ends_the_start(
    start: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies while it loads; the other would wait for it."""
    (tmp_path / "dying.py").write_text(
        "import os\n"
        "from quire.core.worker.multiproc.executor import MultiprocExecutor\n"
        "from quire.core.worker.worker import Worker\n"
        "class Dies(Worker):\n"
        "    def load_model(self):\n"
        "        if self._parallel.rank == 1:\n"
        "            os.abort()\n"
        "        super().load_model()\n"
        "class Executor(MultiprocExecutor):\n"
        "    worker_target = 'dying:Dies'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 \(process \d+\) was killed by SIGABRT"):
        start(*TWO, "--executor", "dying:Executor")
    assert time.monotonic() - begin < 80
