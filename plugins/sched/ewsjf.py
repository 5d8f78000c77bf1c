"""Queues by prompt length, the shortest work first, weighted by how long it waits.

B. Sidik, C. Levi, J. Kampeas, "EWSJF: An Adaptive Scheduler with Hybrid Partitioning for Mixed-Workload LLM Inference",
2026 (arXiv 2601.21758). Requests are put into queues by prompt length, whose bounds follow the traffic; no length of an
answer is predicted. The queue with the highest score goes first: here the time that its first request has waited, over
the tokens that its requests have on average, so that a long prompt gains on short ones until it is served.

Left out: the paper's tuning of weights by Bayesian optimization, and its merging of queues by measured performance: the
bounds are quantiles of recent prompt lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.sdk import BatchingPolicy, GroupKey, RequestInfo, StepView

__all__ = ["EWSJFPolicy"]

_NUM_LENGTHS = 1024
"""Prompt lengths that are remembered to find the bounds."""
_HEAD_START_NS = 1_000_000
"""Added to each wait, so that among requests that came just now the shorter goes first."""


class EWSJFPolicy(BatchingPolicy):
    """Within a queue, in order of arrival."""

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        queues: int = 8
        """Queues, 1 to 64."""
        refresh: int = 256
        """Arrivals after which the bounds are found anew."""

        def __post_init__(self) -> None:
            if not 1 <= self.queues <= 64:
                raise ValueError(f"queues must be between 1 and 64, got {self.queues}")
            if not 1 <= self.refresh <= 10**6:
                raise ValueError(f"refresh must be between 1 and 1000000, got {self.refresh}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._lengths = np.zeros(_NUM_LENGTHS, np.int64)
        self._num_arrivals = 0
        # Until there are lengths to go by: 64, 128, 256 ...
        self._bounds = [64 << i for i in range(self.options.queues - 1)]

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """The arrival."""
        self._lengths[self._num_arrivals % _NUM_LENGTHS] = request.prompt_len
        self._num_arrivals += 1
        if self._num_arrivals % self.options.refresh == 0:
            known = self._lengths[: min(self._num_arrivals, _NUM_LENGTHS)]
            shares = np.arange(1, self.options.queues) / self.options.queues
            self._bounds = sorted(np.quantile(known, shares).astype(int).tolist())
        return (request.arrival_ns,)

    def group_key(self, request: RequestInfo) -> GroupKey:
        """The queue of its prompt length."""
        return bisect_right(self._bounds, request.prompt_len)

    def order_waiting(self, view: StepView) -> NDArray[np.int64] | None:
        """By the scores of the queues."""
        waiting = view.waiting
        if len(waiting) < 2:
            return None
        group, lengths = waiting.group, waiting.num_remaining_tokens
        mean_lengths = np.bincount(group, lengths) / np.maximum(np.bincount(group), 1)
        scores = (view.now_ns + _HEAD_START_NS - waiting.arrival_ns) / mean_lengths.take(group)
        return scores.argmax(0, keepdims=True) if view.num_free_rows == 1 else (-scores).argsort(kind="stable")
