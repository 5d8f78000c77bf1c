"""The executor's own checks, which need a cluster."""

from __future__ import annotations

import pytest

from quire.core.testing.conformance import run_checks
from quire.core.worker.ray.executor import RayExecutor

from .cluster import TwoNodes

pytestmark = pytest.mark.parallel


def test_the_executor_keeps_its_contract(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    failed = [f"{result.name}: {result.reason}" for result in run_checks(RayExecutor) if result.outcome == "failed"]
    assert not failed, "\n".join(failed)
