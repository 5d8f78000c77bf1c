"""Shortest job first: the request with the shortest prompt, unless another has waited long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.sdk import BatchingPolicy, RequestInfo

__all__ = ["SJFPolicy"]


class SJFPolicy(BatchingPolicy):
    """Shortest prompt first. Ageing is linear, so the admission key is fixed at arrival: a prompt queues as if it
    had come ``aging`` seconds later for every thousand tokens."""

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        aging: float = 10.0
        """Seconds of waiting that outweigh a thousand prompt tokens; 0: length alone counts."""

        def __post_init__(self) -> None:
            if not 0 <= self.aging <= 1e6:
                raise ValueError(f"aging is in seconds, 0 to 1000000, got {self.aging}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """Arrival, shifted by the length of the prompt."""
        if self.options.aging <= 0:
            return (request.prompt_len, request.arrival_ns)
        return (request.prompt_len * int(self.options.aging * 1e6) + request.arrival_ns, request.arrival_ns)
