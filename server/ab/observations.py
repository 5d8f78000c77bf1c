"""What an A/B test observed: requests in pairs of equal stretches of traffic, one stretch an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.server.simulate.results import RequestTimes

__all__ = ["ArmTimes", "Observations", "combine_arms"]

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArmTimes:
    """The measured requests of one arm of one pair."""

    pair: int
    arm: int
    """0: A, 1: B."""
    seconds: float
    """How long it was measured."""
    times: RequestTimes


@dataclass(frozen=True, slots=True)
class Observations:
    """All measured requests as columns. Times in seconds; NaN where there is none."""

    pair: NDArray[np.int64]
    arm: NDArray[np.int64]
    ttft_s: _Floats
    tpot_s: _Floats
    e2e_s: _Floats
    output_len: NDArray[np.int64]
    is_served: NDArray[np.bool_]
    groups: Sequence[str]
    """One a request; empty: no groups are known."""
    seconds: _Floats
    """(pairs, 2): how long each arm of each pair was measured."""
    arrival_s: _Floats
    """When each came, for plots."""

    @property
    def num_pairs(self) -> int:
        """Pairs of stretches."""
        return len(self.seconds)

    @property
    def are_arms_identical(self) -> bool:
        """Whether each request of A has its equal in B, to the digit: the arms made the same plans."""
        a, b = self.arm == 0, self.arm == 1
        columns = (self.pair, self.arrival_s, self.ttft_s, self.tpot_s, self.e2e_s, self.output_len, self.is_served)
        return all(np.array_equal(each[a], each[b], equal_nan=each.dtype.kind == "f") for each in columns)


def combine_arms(measured: Sequence[ArmTimes]) -> Observations:
    """Columns of all measured requests. Pairs of which an arm has no request are left out."""
    counts: dict[int, set[int]] = {}
    for each in measured:
        if len(each.times):
            counts.setdefault(each.pair, set()).add(each.arm)
    kept = {pair: number for number, pair in enumerate(sorted(p for p, arms in counts.items() if len(arms) == 2))}
    chosen = [each for each in measured if each.pair in kept and len(each.times)]
    seconds = np.zeros((len(kept), 2))
    for each in chosen:
        seconds[kept[each.pair], each.arm] += each.seconds
    has_groups = all(each.times.groups for each in chosen)

    def join(name: str) -> NDArray[np.float64]:
        columns = [np.asarray(getattr(each.times, name)) for each in chosen]
        return np.concatenate(columns) if columns else np.empty(0)

    sizes = [len(each.times) for each in chosen]
    return Observations(
        pair=np.repeat([kept[each.pair] for each in chosen], sizes).astype(np.int64),
        arm=np.repeat([each.arm for each in chosen], sizes).astype(np.int64),
        ttft_s=join("ttft_s"),
        tpot_s=join("tpot_s"),
        e2e_s=join("e2e_s"),
        output_len=join("output_len").astype(np.int64),
        is_served=join("is_served").astype(bool),
        groups=[group for each in chosen for group in each.times.groups] if has_groups else (),
        seconds=seconds,
        arrival_s=join("arrival_s"),
    )
