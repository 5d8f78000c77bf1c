"""How much of an engine's capacity a trace asks for: near it, no simulator can be trusted.

Queues near saturation grow with ``1 / (1 - load)``: a step model that is off by 3 % changes waiting times by a third
at a load of 0.9, and by more than half at 0.95.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from quire.core.errors import ConfigError
from quire.server.simulate.simulation import EngineSetup, run_simulation
from quire.server.traces.trace import Trace

__all__ = ["TRUSTED_LOAD", "describe_load", "measure_capacity", "measure_load", "scale_to_load"]

TRUSTED_LOAD = 0.95
"""The load beyond which a simulation says so."""

_SAMPLE = 1500
_MIN_REQUESTS = 20
"""Below that, rates say nothing."""
_PEAK_WINDOW_S = 60.0


def measure_capacity(trace: Trace, setup: EngineSetup) -> float | None:
    """Requests a second that one engine finishes when requests of the trace's lengths never run out: from a simulation
    in which all of a sample arrive at once, between its first and last tenth. None if too few of them are
    served to tell."""
    stride = max(len(trace) // _SAMPLE, 1)
    sample = [dataclasses.replace(request, arrival_s=0.0) for request in trace.requests[::stride][:_SAMPLE]]
    times = run_simulation(dataclasses.replace(trace, requests=sample), setup).times
    ends = np.sort(times.e2e_s[times.is_served])
    low, high = len(ends) // 10, len(ends) * 9 // 10
    if len(ends) < _MIN_REQUESTS or ends[high] <= ends[low]:
        return None
    return float((high - low) / (ends[high] - ends[low]))


def measure_load(trace: Trace, setup: EngineSetup, num_replicas: int) -> dict[str, float]:
    """``mean``: the trace's rate as a share of what the engines sustain. ``peak``: that of its busiest minute. Nothing
    where too few requests are served to tell, or all come at once."""
    capacity = measure_capacity(trace, setup) if trace.duration_s else None
    if capacity is None:
        return {}
    capacity *= num_replicas
    arrivals = np.array([request.arrival_s for request in trace.requests])
    window = min(_PEAK_WINDOW_S, max(trace.duration_s, 1e-9))
    most = int((np.searchsorted(arrivals, arrivals + window) - np.arange(len(arrivals))).max())
    # A window of few requests says nothing of a rate.
    peak = most / window if most >= 20 and trace.duration_s > window else trace.rate
    return {"mean": trace.rate / capacity, "peak": max(peak, trace.rate) / capacity, "capacity_per_s": capacity}


def scale_to_load(trace: Trace, setup: EngineSetup, load: float, num_replicas: int) -> Trace:
    """The trace at the speed that makes ``load`` of the engines' capacity."""
    if not trace.duration_s:
        raise ConfigError("--load needs requests that come one after another; give them times with --arrivals")
    capacity = measure_capacity(trace, setup)
    if capacity is None:
        raise ConfigError(
            f"--load: the capacity cannot be measured with fewer than {_MIN_REQUESTS} requests that are served; give a "
            "longer trace, or --time-scale"
        )
    return trace.scale_time(load * capacity * num_replicas / trace.rate)


def describe_load(load: dict[str, float]) -> str:
    """One line, a warning where the figures cannot be trusted."""
    if not load:
        return f"load: not measured; that takes {_MIN_REQUESTS} requests that are served and do not come all at once"
    capacity = f"capacity ({load['capacity_per_s']:.2f} requests/s)"
    text = f"load: {load['mean']:.2f} of {capacity}, {load['peak']:.2f} in its busiest minute"
    if max(load["mean"], load["peak"]) > TRUSTED_LOAD:
        text += (
            f"; beyond {TRUSTED_LOAD} of it queues depend on errors of the step model: do not trust these latencies, "
            "and slow the trace down with --time-scale or --load"
        )
    return text
