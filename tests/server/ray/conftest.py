"""One cluster for all tests of this folder; they are skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import RunningServer
from .cluster import TwoNodes

FAULTS = str(Path(__file__).parents[2] / "worker" / "multiproc")


@pytest.fixture(scope="session")
def cluster() -> Iterator[TwoNodes]:
    """Two nodes with a CPU each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'quire[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAULTS)
        patch.setenv("RAY_AUTH_MODE", "token")  # Ray listens at every address of this host; read when it is imported
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        with TwoNodes() as running:
            yield running


@pytest.fixture
def serve(start: Callable[..., RunningServer], cluster: TwoNodes) -> Callable[..., RunningServer]:
    """Start a server by the guides' command."""

    def begin(*arguments: str) -> RunningServer:
        command = ("--distributed-executor-backend", "ray", "--tensor-parallel-size", "2", "--device", "cpu")
        return start(*command, "--executor-option", f"address={cluster.address}", "--step-timeout", "4", *arguments)

    return begin
