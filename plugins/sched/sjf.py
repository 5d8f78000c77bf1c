"""Shortest job first: the smallest request, unless another has waited long.

Shortest processing time first has the least mean response time of all orders that never interrupt (L. E. Schrage and
L. W. Miller, "The queue M/G/1 with the shortest remaining processing time discipline", Operations Research 14, 1966).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from quire.sdk import BatchingPolicy, RequestInfo

__all__ = ["SJFPolicy"]


class SJFPolicy(BatchingPolicy):
    """Fewest tokens first. Ageing is linear, so the admission key is fixed at arrival: a request queues as if it had
    come ``aging`` seconds later for every thousand tokens."""

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        aging: float = 10.0
        """Seconds of waiting that outweigh a thousand tokens; 0: size alone counts."""
        size: Literal["prompt", "max_tokens", "predicted"] = "prompt"
        """What counts: the prompt; the prompt and ``max_tokens``; or the prompt and ``predicted_tokens`` of the
        request, where it says how many, else ``max_tokens``."""

        def __post_init__(self) -> None:
            if not 0 <= self.aging <= 1e6:
                raise ValueError(f"aging is in seconds, 0 to 1000000, got {self.aging}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """Arrival, shifted by the size."""
        size = request.prompt_len
        if self.options.size == "max_tokens":
            size += request.max_tokens
        elif self.options.size == "predicted":
            size += request.predicted_tokens or request.max_tokens
        if self.options.aging <= 0:
            return (size, request.arrival_ns)
        return (size * int(self.options.aging * 1e6) + request.arrival_ns, request.arrival_ns)
