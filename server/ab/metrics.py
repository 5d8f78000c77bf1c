"""The figures that arms are compared by, for many weightings of the requests at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.server.ab.observations import Observations
from quire.server.simulate.results import Objectives

__all__ = ["Metric", "MetricTable", "list_metric_names", "list_metrics"]

_Floats = NDArray[np.float64]
_PERCENTILES = (50, 95, 99)
_LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end-to-end time"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure."""

    name: str
    quantity: str
    is_ratio: bool
    """Arms are compared by their ratio; else by their difference, in points."""
    lower_is_better: bool
    percentile: str = ""

    @property
    def title(self) -> str:
        """As a line of the report calls it."""
        return f"{self.quantity}, {self.percentile}" if self.percentile else self.quantity


def list_metric_names(objectives: Objectives) -> list[str]:
    """Those that a test may measure; ``fairness`` only where requests have groups."""
    names = [f"{name}_p{percent}" for name in _LATENCIES for percent in _PERCENTILES]
    return [*names, "throughput", *(["slo"] if objectives != Objectives() else []), "fairness"]


def list_metrics(observations: Observations, objectives: Objectives) -> list[Metric]:
    """Those that the observations allow."""
    metrics = [
        Metric(f"{name}_p{p}", title, True, True, f"p{p}") for name, title in _LATENCIES.items() for p in _PERCENTILES
    ]
    metrics.append(Metric("throughput", "output tokens/s", True, False))
    if objectives != Objectives():
        metrics.append(Metric("slo", "objectives kept", False, False))
    if len(set(observations.groups)) > 1:
        metrics.append(Metric("fairness", "fairness between groups", False, False))
    return metrics


class MetricTable:
    """Computes the metrics of both arms for rows of weights of the stretches.

    A stretch is one arm of one pair. Of each only sums are needed, and how many of its requests are among the first
    ``k`` in the order of each latency: the time for a row grows with the logarithm of the number of requests.
    """

    def __init__(self, observations: Observations, objectives: Objectives) -> None:
        self.metrics = list_metrics(observations, objectives)
        num_pairs = observations.num_pairs
        self._num_stretches = 2 * num_pairs
        stretch = observations.pair + num_pairs * observations.arm  # those of A first
        columns = {"ttft": observations.ttft_s, "tpot": observations.tpot_s, "e2e": observations.e2e_s}
        self._latencies = [_SortedLatency(values, stretch, self._num_stretches) for values in columns.values()]
        served = observations.is_served
        kept = served.copy()
        for limit, latency in ((objectives.ttft_ms, columns["ttft"]), (objectives.tpot_ms, columns["tpot"])):
            if limit is not None:
                kept &= ~(latency * 1e3 > limit)

        def sum_by_stretch(values: NDArray[Any]) -> _Floats:
            sums: _Floats = np.bincount(stretch, values.astype(np.float64), self._num_stretches).astype(np.float64)
            return sums

        tokens = np.where(served, observations.output_len, 0)
        self._tokens, self._kept = sum_by_stretch(tokens), sum_by_stretch(kept)
        self._counts = np.bincount(stretch, minlength=self._num_stretches).astype(np.float64)
        self._seconds = observations.seconds.T.reshape(-1)
        groups, waited = np.array(observations.groups), np.nan_to_num(columns["e2e"])
        self._groups = [
            (sum_by_stretch(tokens * (groups == name)), sum_by_stretch(waited * (groups == name)))
            for name in sorted(set(observations.groups))
        ]

    def compute_arms(self, kept: _Floats, swapped: _Floats) -> tuple[_Floats, _Floats]:
        """The metrics of arm A and of arm B, (rows, metrics) each. ``kept`` (rows, pairs) says how often each pair
        counts as it was observed, ``swapped`` how often with its arms exchanged."""
        return self._compute(np.hstack((kept, swapped))), self._compute(np.hstack((swapped, kept)))

    def _compute(self, weights: _Floats) -> _Floats:
        """(rows, metrics) of one arm, in which each stretch has this weight."""
        columns = [column for latency in self._latencies for column in latency.compute_percentiles(weights)]
        columns.append(weights @ self._tokens / np.maximum(weights @ self._seconds, 1e-9))
        names = [metric.name for metric in self.metrics]
        if "slo" in names:
            columns.append(weights @ self._kept / np.maximum(weights @ self._counts, 1e-9))
        if "fairness" in names:
            columns.append(self._compute_fairness(weights))
        return np.stack(columns, axis=1)

    def _compute_fairness(self, weights: _Floats) -> _Floats:
        """Jain's index of the groups' tokens for a second of waiting, as ``quire.server.simulate.results`` has it."""
        speeds = [weights @ tokens / np.maximum(weights @ waited, 1e-9) for tokens, waited in self._groups]
        table = np.stack(speeds, axis=1)
        index: _Floats = table.sum(axis=1) ** 2 / np.maximum(table.shape[1] * (table**2).sum(axis=1), 1e-12)
        return index


class _SortedLatency:
    """One latency of all requests, ascending, and of how many requests of each stretch it is the first ``k``."""

    def __init__(self, values: _Floats, stretch: NDArray[np.int64], num_stretches: int) -> None:
        known = (~np.isnan(values)).nonzero()[0]
        order = known[np.argsort(values[known], kind="stable")]
        self._values = values[order]
        counts = np.zeros((len(order) + 1, num_stretches), np.float32)
        counts[np.arange(1, len(order) + 1), stretch[order]] = 1
        self._reached = counts.cumsum(axis=0, dtype=np.float32)  # (requests + 1, stretches)

    def compute_percentiles(self, weights: _Floats) -> list[_Floats]:
        """By row of weights: the first value at which the weights reach the percentile."""
        if not len(self._values):
            return [np.full(len(weights), np.nan) for _ in _PERCENTILES]
        total = weights @ self._reached[-1]
        return [self._find_value(weights, total * (percent / 100)) for percent in _PERCENTILES]

    def _find_value(self, weights: _Floats, target: _Floats) -> _Floats:
        """By bisection, all rows at once."""
        low, high = np.zeros(len(weights), np.int64), np.full(len(weights), len(self._values))
        while (low < high).any():
            middle = (low + high) // 2
            reached = np.einsum("rs,rs->r", self._reached[middle], weights) >= target
            high = np.where(reached, middle, high)
            low = np.where(reached, low, middle + 1)
        # ``low`` is the number of values that reach it, 1 or more.
        return self._values[np.clip(low - 1, 0, len(self._values) - 1)]
