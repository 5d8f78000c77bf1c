"""Ranks on several hosts, which a Ray cluster joins; the scheduler stays in the engine core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.executor import Executor
from quire.core.env import ray_address
from quire.core.errors import ConfigError
from quire.core.worker.multiproc.executor import MultiprocExecutor
from quire.core.worker.multiproc.rank_group import RankGroup
from quire.core.worker.ray.cluster import RayCluster
from quire.core.worker.ray.ranks import RayRanks

__all__ = ["RayExecutor"]

_EARLIER_S = 4.0
"""By how much a hang is found before the watchdog of the engine core finds it: as long as the nodes may take to answer
what the ranks there do."""


class RayExecutor(MultiprocExecutor):
    """As ``MultiprocExecutor``, with ranks wherever a Ray cluster has a GPU (on a CPU: a CPU) for each.

    Ray places the ranks, says which GPUs are theirs, and ends them with this process. Messages go over TCP connections
    of this executor's own, tensors over NCCL or gloo.
    """

    @dataclass(frozen=True)
    class Options:
        """``address``: of the cluster's head, ``HOST:PORT``; else RAY_ADDRESS, else the cluster of this host.
        ``wait_s``: how many seconds to wait for GPUs that others use."""

        address: str | None = None
        wait_s: float = 30.0

        def __post_init__(self) -> None:
            if not 0 <= self.wait_s <= 86_400:
                raise ConfigError(f"wait_s must be in [0, 86400], got {self.wait_s}")

    def _start_ranks(self) -> RankGroup:
        options = self.options or self.Options()
        device = self.config.model.device
        cluster = RayCluster(options.address or ray_address(), "CPU" if device == "cpu" else "GPU")
        try:
            return RayRanks(cluster, self._layout, device, options.wait_s)
        except BaseException:
            cluster.close()
            raise

    @property
    def _step_limit_s(self) -> float:
        limit = self.config.watchdog.step_timeout_s
        return limit - min(_EARLIER_S, limit / 3)

    def allocate_mask_block(self, num_rows: int, num_words: int) -> NDArray[np.int32]:
        """In memory of this process: masks are sent with the step that they are of."""
        return Executor.allocate_mask_block(self, num_rows, num_words)
