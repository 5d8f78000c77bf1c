"""What a simulation found: times of every request, and the figures made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LATENCIES", "Objectives", "RequestTimes", "SimulationResult"]

_Floats = NDArray[np.float64]

LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end to end"}
"""The latencies of a request, and what they mean."""

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must keep to count as served well; None: nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def check_requests(self, times: RequestTimes) -> NDArray[np.bool_]:
        """Which requests kept it. One that was refused did not."""
        kept = times.is_served.copy()
        for limit, latency in ((self.ttft_ms, times.ttft_s), (self.tpot_ms, times.tpot_s)):
            if limit is not None:
                kept &= ~(latency * 1e3 > limit)  # a request of one token has no time per token, and keeps it
        return kept


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """All requests of a run in order of arrival, as columns. Times in seconds; NaN where there is none."""

    arrival_s: _Floats
    ttft_s: _Floats
    tpot_s: _Floats
    """Mean time per token after the first."""
    e2e_s: _Floats
    prompt_len: NDArray[np.int64]
    output_len: NDArray[np.int64]
    num_cached: NDArray[np.int64]
    num_preemptions: NDArray[np.int64]
    is_served: NDArray[np.bool_]
    groups: Sequence[str] = field(default=())
    """One a request; empty: the trace knows of none."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def get_latency(self, name: str) -> _Floats:
        """``ttft``, ``tpot`` or ``e2e``, by request."""
        values: _Floats = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}[name]
        return values


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """One policy on one trace."""

    policy: str
    times: RequestTimes
    duration_s: float
    """From the first arrival to the last token."""
    num_steps: int
    num_skipped_steps: int
    device_busy_s: float
    """Summed over replicas."""
    unknown_share: float
    """The share of that in steps larger than any that the step model knows, whose times are guesses."""
    known_steps: str
    """The largest steps that it knows."""
    num_replicas: int
    queue_depth: Sequence[tuple[float, int, int]]
    """At each arrival: seconds, requests that wait, requests that run; summed over replicas."""
    wall_s: float
    """Seconds that the simulation took; not of the simulated engine."""
    quarantined: Sequence[str] = ()
    """Policies that were replaced, and why."""
    first_refusal: str = ""
    """Why the first request that was not served was refused; empty: all were served."""
    load: Mapping[str, float] = field(default_factory=dict)
    """``mean`` and ``peak`` share of the engine's capacity that the trace offers, where it was measured."""

    def summarize(self, objectives: Objectives | None = None) -> dict[str, Any]:
        """The figures, by name. The same trace, seed and step model give the same, to the digit."""
        times = self.times
        served = times.is_served
        figures: dict[str, Any] = {
            "policy": self.policy,
            "requests": len(times),
            "served": int(served.sum()),
            "duration_s": self.duration_s,
            "requests_per_s": float(served.sum()) / self.duration_s if self.duration_s else 0.0,
            "output_tokens_per_s": float(times.output_len[served].sum()) / self.duration_s if self.duration_s else 0.0,
        }
        for name in LATENCIES:
            figures |= _describe_latency(name, times.get_latency(name))
        if objectives is not None:
            figures["slo_attainment"] = float(objectives.check_requests(times).mean()) if len(times) else 0.0
        prompt_tokens = max(int(times.prompt_len[served].sum()), 1)
        figures |= {
            "cached_share": float(times.num_cached[served].sum()) / prompt_tokens,
            "preemptions": int(times.num_preemptions.sum()),
            "steps": self.num_steps,
            "device_busy": self.device_busy_s / (self.duration_s * self.num_replicas) if self.duration_s else 0.0,
            "unknown_step_share": self.unknown_share,
            "most_waiting": max((waiting for _, waiting, _ in self.queue_depth), default=0),
        }
        if self.load:
            figures["load"] = dict(self.load)
        if times.groups:
            figures["groups"] = describe_groups(times)
            figures["fairness"] = compute_fairness(times)
        if self.first_refusal:
            figures["first_refusal"] = self.first_refusal
        if self.quarantined:
            figures["quarantined"] = list(self.quarantined)
        return figures


def describe_groups(times: RequestTimes) -> dict[str, dict[str, float]]:
    """Of each group its requests, tokens and latencies."""
    groups = np.array(times.groups)
    described = {}
    for name in sorted(set(times.groups)):
        of_group = groups == name
        figures: dict[str, float] = {
            "requests": int(of_group.sum()),
            "output_tokens": int(times.output_len[of_group].sum()),
        }
        for latency in LATENCIES:
            figures |= _describe_latency(latency, times.get_latency(latency)[of_group])
        described[name] = figures
    return described


def compute_fairness(times: RequestTimes) -> float:
    """Jain's index of the groups' mean end-to-end time for an output token: 1 if all are served alike, 1 / groups if
    one is served alone (Jain, Chiu and Hawe, 1984)."""
    groups = np.array(times.groups)
    speeds = []
    for name in set(times.groups):
        chosen = (groups == name) & times.is_served
        if chosen.any():
            speeds.append(float(times.output_len[chosen].sum() / max(times.e2e_s[chosen].sum(), 1e-9)))
    values = np.array(sorted(speeds))
    return float(values.sum() ** 2 / (len(values) * (values**2).sum())) if len(values) else 1.0


def _describe_latency(name: str, values: _Floats) -> dict[str, float]:
    """Milliseconds: mean and percentiles of the requests that have it."""
    known = values[~np.isnan(values)] * 1e3
    if not len(known):
        return {f"{name}_mean_ms": float("nan"), **{f"{name}_p{p}_ms": float("nan") for p in _PERCENTILES}}
    percentiles = np.percentile(known, _PERCENTILES).tolist()
    return {
        f"{name}_mean_ms": float(known.mean()),
        **{f"{name}_p{p}_ms": value for p, value in zip(_PERCENTILES, percentiles, strict=True)},
    }
