"""Longest cached prefix first, with age.

L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024 (arXiv 2312.07104),
section 3: serving the longest shared prefix first reaches the best hit rate of a cache, but may starve. Here a cached
token is worth some waiting, so a request is overtaken only by those that came a bounded time after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.sdk import BatchingPolicy, RequestInfo, StepView

__all__ = ["PrefixAffinityPolicy"]


class PrefixAffinityPolicy(BatchingPolicy):
    """A request queues as if it had come ``bonus`` seconds sooner for every thousand tokens of it that are cached.
    Those cached when it arrives give its place in the queue, those cached now its place among the head of the queue."""

    reads_prefix_cache = True

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        bonus: float = 10.0
        """Seconds of waiting that a thousand cached tokens outweigh: no request is overtaken by one this much later
        for each thousand tokens of the longest cached prefix."""

        def __post_init__(self) -> None:
            if not 0 <= self.bonus <= 1e6:
                raise ValueError(f"bonus is in seconds, 0 to 1000000, got {self.bonus}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._ns_per_token = int(self.options.bonus * 1e6)

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """Arrival, shifted by what is cached."""
        return (request.arrival_ns - request.num_cached_tokens * self._ns_per_token, request.arrival_ns)

    def order_waiting(self, view: StepView) -> NDArray[np.int64] | None:
        """The head of the queue in the order of what is cached now."""
        waiting = view.waiting
        if len(waiting) < 2:
            return None
        places = waiting.arrival_ns - waiting.num_cached_tokens * self._ns_per_token
        return places.argmin(0, keepdims=True) if view.num_free_rows == 1 else places.argsort(kind="stable")
