"""Pearson's chi-square test: whether counts of samples are those of a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChiSquare", "group_classes"]

_LEAST_EXPECTED = 5
"""Classes of which fewer samples are expected are counted together."""


@dataclass(frozen=True)
class ChiSquare:
    """The statistic of a sample. Its mean is its degrees of freedom, and its variance twice that."""

    statistic: float
    freedom: int
    num_impossible: int
    """Samples of classes whose probability is 0; they are not in the statistic."""

    @classmethod
    def measure(cls, counts: Tensor, probability: Tensor) -> ChiSquare:
        """Of ``counts`` (classes,) of samples that should follow ``probability`` (classes,)."""
        counts, probability = counts.double().cpu(), probability.double().cpu()
        expected = probability / probability.sum() * counts.sum()
        rare = expected < _LEAST_EXPECTED
        statistic = ((counts - expected) ** 2 / expected)[~rare].sum()
        impossible = counts[expected == 0].sum()
        if (of_rare := expected[rare].sum()) > 0:
            statistic += (counts[rare].sum() - impossible - of_rare) ** 2 / of_rare
        return cls(float(statistic), int((~rare).sum()) - 1 + int(rare.any()), int(impossible))

    @property
    def deviations(self) -> float:
        """Standard deviations above the mean: more than 6 come by chance once in ten thousand tests at most."""
        return (self.statistic - self.freedom) / math.sqrt(max(1, 2 * self.freedom))


def group_classes(probability: Tensor, num_classes: int) -> Tensor:
    """For each of many outcomes (n,) its class, 0 to ``num_classes - 1``: classes of about equal probability, in which
    those of like probability are together; those of probability 0 are class ``num_classes``."""
    order = probability.argsort(descending=True)
    before = probability[order].double().cumsum(0) - probability[order]
    classes = torch.empty_like(order)
    classes[order] = (before * num_classes).long().clamp(0, num_classes - 1)
    return classes.masked_fill(probability == 0, num_classes)
