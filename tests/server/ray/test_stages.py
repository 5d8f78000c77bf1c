"""Two stages of two ranks, a stage on each of two nodes: the guides' command, with sizes for two nodes of two CPUs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator

import httpx
import pytest

from ..conftest import RunningServer, has_ended, until
from .cluster import HEAD, OTHER, TwoNodes
from .engines import LONG, TEXT, begin_request, find_error, find_ranks, read_node

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def cluster(cluster: TwoNodes) -> Iterator[TwoNodes]:
    """Another one, beside the one that gives each node a CPU."""
    with TwoNodes(num_cpus=2) as running:
        yield running


def test_stages_lie_on_nodes(start: Callable[..., RunningServer], serve: Callable[..., RunningServer]) -> None:
    request = LONG | {"max_tokens": 40}
    alone = start("--device", "cpu")
    expected = httpx.post(alone.url + TEXT, json=request, timeout=180).json()["choices"]
    assert alone.stop() == 0

    server = serve("--pipeline-parallel-size", "2", "--on-hang", "exit")
    assert httpx.post(server.url + TEXT, json=request, timeout=180).json()["choices"] == expected
    ranks = find_ranks(server, 4)
    assert [read_node(pid) for pid in ranks] == [HEAD, HEAD, OTHER, OTHER]
    waiting, answers = begin_request(server)
    os.kill(ranks[3], signal.SIGKILL)
    assert server.process.wait(60) == 1
    waiting.join(10)
    assert answers[0].status_code == 503
    reason = rf"rank 3 \(stage 1, process {ranks[3]} on {OTHER}\) was killed by SIGKILL"
    assert re.search(reason, find_error(server))
    until(lambda: all(has_ended(pid) for pid in ranks))
