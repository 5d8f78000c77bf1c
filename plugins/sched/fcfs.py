"""First come, first served: the engine's default, and what takes over from a policy that fails."""

from __future__ import annotations

from typing import Any

from quire.sdk import BatchingPolicy, RequestInfo

__all__ = ["FCFSPolicy"]


class FCFSPolicy(BatchingPolicy):
    """Decodes first, then waiting requests in order of arrival."""

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """The time of arrival."""
        return (request.arrival_ns,)
