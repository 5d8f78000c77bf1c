"""What every executor has to do, over one rank and over two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quire.core.config import EngineConfig, ParallelConfig
from quire.core.worker.multiproc.executor import MultiprocExecutor
from quire.testing import parametrize_with_checks

pytestmark = pytest.mark.parallel


class TwoRanks(MultiprocExecutor):
    """Whatever the configuration says."""

    def __init__(self, config: EngineConfig, options: Any = None) -> None:
        super().__init__(replace(config, parallel=ParallelConfig(2)), options)


@parametrize_with_checks(MultiprocExecutor)
def test_one_rank_conforms(check: Any) -> None:
    check()


@parametrize_with_checks(
    TwoRanks, expected_failures={"check_start_tells_the_capacity": "a rank's blocks have half of the KV heads"}
)
def test_two_ranks_conform(check: Any) -> None:
    check()
