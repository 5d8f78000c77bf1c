"""The verdict: effects with confidence intervals, corrected for several metrics, and what the run could have seen.

Traffic comes in pairs of stretches, of which a coin chose the one that is A. If the arms do not differ, swapping the
two of a pair changes nothing: the p-value is the share of random swaps whose effect is as large as the one observed
(Fisher's randomization test; for switchbacks Bojinov, Simchi-Levi and Zhao, 2023). Intervals come from resampling whole
pairs, since requests of one stretch share queues and batches. P-values are corrected for the number of metrics by
Holm's method.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.errors import ConfigError
from quire.server.ab.metrics import Metric, MetricTable
from quire.server.ab.observations import Observations
from quire.server.simulate.fit import import_scipy
from quire.server.simulate.results import Objectives

__all__ = ["MIN_PAIRS", "Effect", "Verdict", "analyze_pairs"]

MIN_PAIRS = 12
"""Pairs below which no verdict is given: with 8, the least p-value is 1 in 128, which 12 metrics make 1 in 10."""

WANTED_EFFECT = 0.05
"""The effect for which a length is recommended."""

_Floats = NDArray[np.float64]
_NUM_SWAPS = 999
_NUM_SAMPLES = 300
_CONFIDENCE = 0.95
_POWER = 0.8
_PLANNED_POWER = 0.9  # of the recommended length: its noise is itself an estimate


@dataclass(frozen=True, slots=True)
class Effect:
    """What B does to one metric. Effects of ratios are shares (0.05: 5 % more than A), others are differences."""

    metric: Metric
    a: float
    b: float
    effect: float
    low: float
    """Of the 95 % confidence interval."""
    high: float
    p_value: float
    corrected_p: float
    smallest_effect: float | None
    """That 4 of 5 runs of this length would have found, after the correction; None where the arms are equal in every
    pair, which says nothing of the noise."""
    recommended_pairs: int
    """Of a run that would find an effect of 5 % (5 points), 9 times of 10; 0: that is not known."""

    @property
    def is_significant(self) -> bool:
        """Whether the arms differ in it, at 95 %, after the correction."""
        return self.corrected_p < 1 - _CONFIDENCE

    @property
    def is_better(self) -> bool:
        """Whether B is the better arm in it, significant or not."""
        return self.effect < 0 if self.metric.lower_is_better else self.effect > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The effects of all metrics."""

    effects: list[Effect]
    num_pairs: int
    num_requests: int
    pair_seconds: float
    """Traffic of a pair, both stretches, with what was washed out."""
    is_identical: bool = False
    """Whether the arms are equal to the digit, request by request, so that nothing was compared."""

    @property
    def significant(self) -> list[Effect]:
        """Those in which the arms differ."""
        return [effect for effect in self.effects if effect.is_significant]

    def get_effect(self, name: str) -> Effect:
        """The effect on one metric. Raises ``ConfigError`` for one that was not measured."""
        for effect in self.effects:
            if effect.metric.name == name:
                return effect
        known = ", ".join(effect.metric.name for effect in self.effects)
        raise ConfigError(f"--primary {name} was not measured; choose from {known}")

    @property
    def is_final(self) -> bool:
        """Whether there were enough pairs to say anything."""
        return self.num_pairs >= MIN_PAIRS

    def summarize(self) -> str:
        """One sentence."""
        if not self.is_final:
            return f"No verdict: {self.num_pairs} pairs were measured, and {MIN_PAIRS} are the least."
        if self.is_identical:
            return "Both arms made the same plans, so that nothing was compared."
        if not self.significant:
            return "No difference was found."
        better = _name_quantities([e.metric for e in self.significant if e.is_better])
        worse = _name_quantities([e.metric for e in self.significant if not e.is_better])
        parts = [f"better in {better}"] if better else []
        parts += [f"worse in {worse}"] if worse else []
        return f"B is {', and '.join(parts)}."


def _name_quantities(metrics: Sequence[Metric]) -> str:
    """``time to first token (p50, p95), output tokens/s``."""
    percentiles: dict[str, list[str]] = {}
    for metric in metrics:
        percentiles.setdefault(metric.quantity, []).extend([metric.percentile] if metric.percentile else [])
    return ", ".join(name + (f" ({', '.join(shares)})" if shares else "") for name, shares in percentiles.items())


def import_packages() -> tuple[Any, Any]:
    """``scipy.stats`` and ``statsmodels.stats.multitest``. Raises ``ConfigError`` where the extra is not installed."""
    try:
        multitest = importlib.import_module("statsmodels.stats.multitest")
    except ImportError:
        raise ConfigError("quire ab needs statsmodels; pip install 'quire[ab]'") from None
    return import_scipy("stats", "quire ab"), multitest


def analyze_pairs(
    observations: Observations,
    objectives: Objectives,
    pair_seconds: float,
    seed: int = 0,
    min_pairs: int = MIN_PAIRS,
) -> Verdict:
    """Compare the arms. Raises ``ConfigError`` with fewer than ``min_pairs`` pairs, two at least."""
    stats, multitest = import_packages()
    num_pairs = observations.num_pairs
    if num_pairs < min_pairs:
        raise ConfigError(
            f"{num_pairs} pairs of stretches have requests in both arms, and {min_pairs} are needed; run longer, or "
            "give more --pairs"
        )
    table = MetricTable(observations, objectives)
    rng = np.random.default_rng([seed, 3])
    ones, zeros = np.ones((1, num_pairs)), np.zeros((1, num_pairs))
    a, b = table.compute_arms(ones, zeros)
    observed = _compare(table.metrics, a, b)[0]
    is_swapped = rng.integers(0, 2, (_NUM_SWAPS, num_pairs)).astype(np.float64)
    swapped = _compare(table.metrics, *table.compute_arms(1 - is_swapped, is_swapped))
    counts = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), _NUM_SAMPLES).astype(np.float64)
    sampled = _compare(table.metrics, *table.compute_arms(counts, np.zeros_like(counts)))
    tiny = 1e-12  # equal arms: every swap is as large
    p_values = (1 + (np.abs(swapped) >= np.abs(observed) - tiny).sum(axis=0)) / (_NUM_SWAPS + 1)
    corrected: _Floats = multitest.multipletests(p_values, method="holm")[1]
    errors = np.nanstd(sampled, axis=0, ddof=1) * math.sqrt(num_pairs / (num_pairs - 1))
    degrees, num_metrics = num_pairs - 1, len(table.metrics)
    width = float(stats.t.ppf((1 + _CONFIDENCE) / 2, degrees))
    threshold = float(stats.t.ppf(1 - (1 - _CONFIDENCE) / (2 * num_metrics), degrees))
    visible = (threshold + float(stats.t.ppf(_POWER, degrees))) * errors
    planned = (threshold + float(stats.t.ppf(_PLANNED_POWER, degrees))) * errors
    differs = np.maximum(np.abs(observed), errors) > tiny
    effects = []
    for i, metric in enumerate(table.metrics):
        wanted = math.log1p(WANTED_EFFECT) if metric.is_ratio else WANTED_EFFECT
        share = float(planned[i]) / wanted
        effects.append(
            Effect(
                metric,
                float(a[0, i]),
                float(b[0, i]),
                _to_share(metric, observed[i]),
                _to_share(metric, observed[i] - width * errors[i]),
                _to_share(metric, observed[i] + width * errors[i]),
                float(p_values[i]),
                float(corrected[i]),
                _to_share(metric, visible[i]) if differs[i] else None,
                max(math.ceil(num_pairs * share**2), MIN_PAIRS) if differs[i] and math.isfinite(share) else 0,
            )
        )
    return Verdict(effects, num_pairs, len(observations.pair), pair_seconds, observations.are_arms_identical)


def _compare(metrics: list[Metric], a: _Floats, b: _Floats) -> _Floats:
    """(rows, metrics): logarithms of ratios, or differences. 0 where an arm has no value."""
    ratios = np.array([metric.is_ratio for metric in metrics])
    with np.errstate(divide="ignore", invalid="ignore"):
        compared = np.where(ratios, np.log(b) - np.log(a), b - a)
    return np.nan_to_num(compared, nan=0.0, posinf=0.0, neginf=0.0)


def _to_share(metric: Metric, value: float) -> float:
    return math.expm1(float(value)) if metric.is_ratio else float(value)
