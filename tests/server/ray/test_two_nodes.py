"""Two ranks on two nodes of a Ray cluster serve as one process does; what the cluster lacks is said in a line."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from quire import LLM
from quire.core.errors import ConfigError

from ..conftest import RunningServer, has_ended, until
from .cluster import HEAD, OTHER, TwoNodes
from .engines import SIZES, begin_request, cpu_seconds, find_error, find_ranks, generate, open_engine, read_node

pytestmark = pytest.mark.parallel


def test_tokens_are_those_of_one_process(tiny_model: str, cluster: TwoNodes) -> None:
    one = LLM(tiny_model, **SIZES)
    expected = generate(one)
    one.shutdown()
    engine = open_engine(tiny_model, cluster)
    try:
        assert generate(engine) == expected
        ranks = engine.engine_core.executor.pids  # type: ignore[attr-defined]
        assert [read_node(pid) for pid in ranks] == [HEAD, OTHER]
        before = [cpu_seconds(pid) for pid in ranks]
        time.sleep(2)
        used = [cpu_seconds(pid) - seconds for pid, seconds in zip(ranks, before, strict=True)]
        assert max(used) < 0.3, "ranks that have nothing to do wait without a core"
    finally:
        engine.shutdown()
    until(lambda: all(has_ended(pid) for pid in ranks))


def test_a_cluster_that_is_too_small_says_what_it_has(tiny_model: str, cluster: TwoNodes) -> None:
    reason = rf"^4 ranks take a CPU each, and the Ray cluster has 2 \({HEAD} 1, {OTHER} 1\); start Ray on"
    with pytest.raises(ConfigError, match=reason):
        open_engine(tiny_model, cluster, tensor_parallel_size=4)


def test_a_cluster_that_is_not_there_is_said_in_a_line(tiny_model: str, cluster: TwoNodes) -> None:
    options = {"executor": {"address": f"{OTHER}:1"}}
    with pytest.raises(ConfigError, match=rf"^no Ray cluster answers at {OTHER}:1: start one there with `ray start"):
        open_engine(tiny_model, cluster, plugin_options=options)


def test_a_node_that_disappears_is_named(serve: Callable[..., RunningServer], cluster: TwoNodes) -> None:
    server = serve("--on-hang", "exit")
    ranks = find_ranks(server)
    waiting, answers = begin_request(server)
    begin = time.monotonic()
    cluster.kill_other()
    try:
        assert server.process.wait(60) == 1
        assert time.monotonic() - begin < 30
        waiting.join(10)
        assert answers[0].status_code == 503
        assert f"rank 1 (process {ranks[1]} on {OTHER}) disappeared with its node" in find_error(server)
        until(lambda: all(has_ended(pid) for pid in ranks))
    finally:
        cluster.start_other()
