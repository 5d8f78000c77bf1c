"""Fair shares by virtual token counters.

Y. Sheng, S. Cao, D. Li, B. Zhu, Z. Li, D. Zhuo, J. E. Gonzalez, I. Stoica, "Fairness in Serving Large Language Models",
OSDI 2024 (arXiv 2401.00588). Each group has a counter of the tokens that it was served; who has the smallest goes next.
A group that comes back is lifted to the smallest counter of those that wait, so that no group saves up credit. Between
two groups that always have requests waiting, service then differs by a constant, however long they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.sdk import BatchingPolicy, GroupColumns, GroupKey, RequestInfo, StepView

__all__ = ["FairSharePolicy"]


class FairSharePolicy(BatchingPolicy):
    """Groups (API keys, or what clients name) share the engine by weight; within a group, in order of arrival."""

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        input_weight: float = 1.0
        """What a prompt token counts."""
        output_weight: float = 2.0
        """What a generated token counts: the paper takes twice as much as for a prompt token."""
        weights: tuple[str, ...] = ()
        """Shares of groups, such as ``team-a=2,team-b=0.5``; others have 1."""

        def __post_init__(self) -> None:
            for name in ("input_weight", "output_weight"):
                if not 0 < getattr(self, name) <= 1e6:
                    raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
            parse_weights(self.weights)

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._weight_of = parse_weights(self.options.weights)
        self._keys: Sequence[GroupKey] = ()
        # By index of the group: what a token adds to its counter, and by how much it was lifted.
        self._input_rates = self._output_rates = self._lifts = np.empty(0)
        self._was_waiting = np.empty(0, bool)
        # When groups waited last: the counters of all, and which of them waited.
        self._last_counters, self._last_waiting = np.zeros(1), np.ones(1, bool)

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """The arrival: within a group, first come, first served."""
        return (request.arrival_ns,)

    def group_key(self, request: RequestInfo) -> GroupKey:
        """The name of the API key, or what the client calls its group."""
        return request.group

    def order_waiting(self, view: StepView) -> NDArray[np.int64] | None:
        """The order in which the counters choose requests."""
        assert view.groups is not None
        counters = self._update_counters(view, view.groups)
        waiting = view.waiting
        if not len(waiting):
            return None
        group = waiting.group
        if view.num_free_rows == 1:  # of each group, the view shows its first request first
            first: NDArray[np.int64] = counters.take(group).argmin(0, keepdims=True)
            return first
        follows = group[1:] == group[:-1]  # the view shows one group after another
        if not np.count_nonzero(follows):
            alone: NDArray[np.int64] = counters.take(group).argsort(kind="stable")
            return alone
        # A request is charged its prompt when it is chosen: the next one of its group stands so much further back. So
        # the choice of the smallest counter, again and again, is one sort.
        charges = waiting.num_remaining_tokens * self._input_rates[group]
        totals = np.cumsum(charges)
        is_first = np.ones(len(group), bool)
        is_first[1:] = ~follows
        before_group = (totals - charges)[is_first][np.cumsum(is_first) - 1]
        starts = counters[group] + (totals - charges - before_group)
        order: NDArray[np.int64] = starts.argsort(kind="stable")
        return order

    def _update_counters(self, view: StepView, groups: GroupColumns) -> NDArray[np.float64]:
        if groups.keys is not self._keys:
            self._follow_groups(groups.keys)
        counters = self._input_rates * groups.num_prompt_tokens
        counters += self._output_rates * groups.num_output_tokens
        counters += self._lifts
        remaining = view.running.num_remaining_tokens
        # What running prompts still have to compute is theirs already.
        if len(remaining) and remaining.item(remaining.argmax()) > 1:
            size = len(groups.keys)
            counters += self._input_rates * np.bincount(view.running.group, remaining, size)[:size]
        is_waiting = groups.num_waiting > 0
        joined = is_waiting > self._was_waiting
        if np.count_nonzero(joined):
            stayed = counters[is_waiting & self._was_waiting]
            level = (stayed if len(stayed) else self._last_counters[self._last_waiting]).min()
            missing = np.where(joined, np.maximum(level - counters, 0.0), 0.0)
            self._lifts = self._lifts + missing
            counters += missing
        if len(view.waiting) or is_waiting.any():
            self._last_counters, self._last_waiting = counters, is_waiting
        self._was_waiting = is_waiting
        return counters

    def _follow_groups(self, keys: Sequence[GroupKey]) -> None:
        """Take over what is known of groups that kept their index. The others are new."""
        kept = min(len(keys), len(self._keys))
        lifts, was_waiting = np.zeros(len(keys)), np.zeros(len(keys), bool)
        lifts[:kept], was_waiting[:kept] = self._lifts[:kept], self._was_waiting[:kept]
        for index in range(kept):
            if keys[index] != self._keys[index]:
                lifts[index], was_waiting[index] = 0.0, False
        self._keys, self._lifts, self._was_waiting = keys, lifts, was_waiting
        weights = np.array([self._weight_of.get(key, 1.0) for key in keys])
        self._input_rates = self.options.input_weight / weights
        self._output_rates = self.options.output_weight / weights


def parse_weights(pairs: Sequence[str]) -> dict[GroupKey, float]:
    """``["a=2", "b=0.5"]`` as a mapping. Raises ``ValueError`` with what is wrong."""
    weights: dict[GroupKey, float] = {}
    for pair in pairs:
        name, _, text = pair.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight <= 1e6:
            raise ValueError(f"weights are written NAME=NUMBER, with a number above 0, got {pair!r}")
        weights[name] = weight
    return weights
