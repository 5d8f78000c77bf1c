"""First come, first served: the default policy, which also takes over from one that fails."""

from __future__ import annotations

from typing import Any

from quire.sdk import BatchingPolicy, RequestInfo

__all__ = ["FCFSPolicy"]


class FCFSPolicy(BatchingPolicy):
    """Decodes first, then waiting requests in order of arrival."""

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """The time of its arrival."""
        return (request.arrival_ns,)
