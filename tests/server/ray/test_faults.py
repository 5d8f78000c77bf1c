"""Whatever ends, stops or hangs one of two ranks on two nodes: a line names it, and no process is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import httpx
import pytest

from quire.core.errors import WorkerDiedError

from ..conftest import RunningServer, child_processes, has_ended, until
from .cluster import HEAD, OTHER, TwoNodes
from .engines import LONG, TEXT, begin_request, find_error, find_ranks, generate, open_engine, read_parent

pytestmark = pytest.mark.parallel


def test_a_rank_that_hangs_is_named(tiny_model: str, cluster: TwoNodes) -> None:
    engine = open_engine(tiny_model, cluster, executor="rank_faults:FaultyRayExecutor", step_timeout=3)
    ranks = engine.engine_core.executor.pids  # type: ignore[attr-defined]
    arguments = {"method": "set_fault", "arguments": {"fault": "hang", "rank": 1}}
    engine.engine_core.control.call_method("collective_rpc", arguments)
    with pytest.raises(WorkerDiedError, match=rf"^rank 1 \(process {ranks[1]} on {OTHER}\) hangs, and others wait"):
        generate(engine)
    until(lambda: all(has_ended(pid) for pid in ranks))
    engine.shutdown()


def test_a_node_that_stands_still_is_named(tiny_model: str, cluster: TwoNodes) -> None:
    engine = open_engine(tiny_model, cluster, step_timeout=12)
    ranks = engine.engine_core.executor.pids  # type: ignore[attr-defined]
    stopped = [ranks[1], read_parent(ranks[1])]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        with pytest.raises(
            WorkerDiedError, match=rf"^rank 1 \(process {ranks[1]} on {OTHER}\) and what watches it there"
        ):
            generate(engine)
        assert time.monotonic() - begin < 30
    finally:
        engine.shutdown()
    until(lambda: all(has_ended(pid) for pid in (*ranks, *stopped)))


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, r"is stopped \(SIGSTOP, or a debugger\)")],
    ids=["SIGKILL", "SIGSTOP"],
)
def test_a_rank_that_ends_or_stops_is_named(
    serve: Callable[..., RunningServer], number: signal.Signals, reason: str
) -> None:
    server = serve("--on-hang", "exit")
    [engine], ranks = child_processes(server.process.pid), find_ranks(server)
    waiting, answers = begin_request(server)
    os.kill(ranks[1], number)
    begin = time.monotonic()
    assert server.process.wait(60) == 1
    assert time.monotonic() - begin < 30
    waiting.join(10)
    assert answers[0].status_code == 503 and "rank 1" in answers[0].json()["error"]["message"]
    until(lambda: all(has_ended(pid) for pid in (engine, *ranks)))
    assert re.search(rf"rank 1 \(process {ranks[1]} on {OTHER}\) {reason}", find_error(server))


def test_another_engine_finds_room_on_the_same_nodes(serve: Callable[..., RunningServer]) -> None:
    """And answers the request that was running; its ranks end with the server."""
    server = serve()
    expected = httpx.post(server.url + TEXT, json=LONG, timeout=180).json()["choices"]
    ranks = find_ranks(server)
    waiting, answers = begin_request(server)
    os.kill(ranks[0], signal.SIGKILL)
    waiting.join(180)
    assert answers[0].json()["choices"] == expected
    line = find_error(server)
    assert f"rank 0 (process {ranks[0]} on {HEAD})" in line and "starting another engine (restart 1)" in line
    replaced = find_ranks(server)
    assert replaced != ranks and all(has_ended(pid) for pid in ranks)
    os.kill(replaced[1], signal.SIGSTOP)  # one that cannot look
    server.process.kill()
    until(lambda: all(has_ended(pid) for pid in replaced), 20)
