"""One engine after the other, whatever their load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.sdk import ReplicaLoad, RoutedRequest, Router

__all__ = ["RoundRobinRouter"]


class RoundRobinRouter(Router):
    """Takes turns. Fair if all requests are alike."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._num_requests = 0

    def choose_replica(self, request: RoutedRequest, replicas: Sequence[ReplicaLoad]) -> int:
        """The one after the last."""
        chosen = self._num_requests % len(replicas)
        self._num_requests += 1
        return chosen
