"""Differences between two models on the same questions, with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.server.evaluation.report import wilson_interval

__all__ = ["Estimate", "PairedScore", "bootstrap"]

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | list[float]]:
        """Return plain data."""
        return {"value": self.value, "interval": [self.low, self.high]}


@dataclass(frozen=True, slots=True)
class PairedScore:
    """Questions of one skill, by the models that answered them right."""

    skill: str
    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def n(self) -> int:
        """How many questions were asked."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def loss(self) -> Estimate:
        """What B loses, A's share minus B's, from -1 to 1; the interval is Newcombe's for paired shares (Statistics in
        Medicine 17 (1998) 2635, method 10)."""
        n = self.n
        if not n:
            return Estimate(0.0, -1.0, 1.0)
        a, b = self.both + self.only_a, self.both + self.only_b
        (low_a, high_a), (low_b, high_b) = wilson_interval(a, n), wilson_interval(b, n)
        share_a, share_b, phi = a / n, b / n, self._correlation()
        down, up = share_a - low_a, high_a - share_a
        b_down, b_up = share_b - low_b, high_b - share_b
        lower = math.sqrt(max(0.0, down**2 - 2 * phi * down * b_up + b_up**2))
        upper = math.sqrt(max(0.0, up**2 - 2 * phi * up * b_down + b_down**2))
        loss = share_a - share_b
        return Estimate(loss, max(-1.0, loss - lower), min(1.0, loss + upper))

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely so uneven a split of the questions that only one answered is by chance."""
        total, least = self.only_a + self.only_b, min(self.only_a, self.only_b)
        return float(min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total))

    def _correlation(self) -> float:
        margins = (
            (self.both + self.only_a)
            * (self.only_b + self.neither)
            * (self.both + self.only_b)
            * (self.only_a + self.neither)
        )
        if not margins:
            return 0.0
        product = self.both * self.neither - self.only_a * self.only_b
        if product > 0:
            product = max(0, product - self.n / 2)  # type: ignore[assignment]
        return product / math.sqrt(margins)


def bootstrap(
    blocks: NDArray[np.float64], of: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda mean: mean
) -> Estimate:
    """``of`` the mean over ``blocks`` (n,), with an interval from resampling whole blocks (percentiles, seeded):
    tokens of one text depend on each other, so whole texts are resampled."""
    resampled = np.random.default_rng(0).integers(0, len(blocks), (_RESAMPLES, len(blocks)))
    low, high = np.percentile(of(blocks[resampled].mean(1)), (2.5, 97.5))
    return Estimate(float(of(blocks.mean(keepdims=True))[0]), float(low), float(high))
