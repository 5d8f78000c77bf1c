"""The engine with the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence

from quire.sdk import ReplicaLoad, RoutedRequest, Router

__all__ = ["LeastLoadedRouter"]


class LeastLoadedRouter(Router):
    """Join the shortest queue: the fewest requests, then the most free KV blocks, then the first."""

    def choose_replica(self, request: RoutedRequest, replicas: Sequence[ReplicaLoad]) -> int:
        """The one with the fewest requests."""
        return min(range(len(replicas)), key=lambda i: (replicas[i].num_requests, replicas[i].kv_usage, i))
