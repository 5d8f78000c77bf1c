"""By the request's priority; a request that waits long enough overtakes those of higher priority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.sdk import BatchingPolicy, RequestInfo

__all__ = ["PriorityPolicy"]


class PriorityPolicy(BatchingPolicy):
    """Lower ``priority`` first. Ageing is linear, so the admission key is fixed at arrival: a request of priority
    ``p`` queues as if it had come ``p * aging`` seconds later than it did."""

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        aging: float = 60.0
        """Seconds of waiting that outweigh one level of priority; 0: priority is absolute."""

        def __post_init__(self) -> None:
            if not 0 <= self.aging <= 1e6:
                raise ValueError(f"aging is in seconds, 0 to 1000000, got {self.aging}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """Arrival, shifted by the priority."""
        if self.options.aging <= 0:
            return (request.priority, request.arrival_ns)
        return (request.priority * int(self.options.aging * 1e9) + request.arrival_ns, request.arrival_ns)
