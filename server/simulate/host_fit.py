"""What a step takes on the host, fitted to recorded steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.traces.records import ArrivalRecord, DoneRecord
from quire.server.simulate.device_fit import MIN_KIND_STEPS
from quire.server.simulate.step_model import HostTimes
from quire.server.traces.recording import Recording

__all__ = ["fit_host"]

_Floats = NDArray[np.float64]
_PARTS = ("schedule", "launch", "update")
_MEDIAN_OF = 5
_BLOCKED = 3.0


class _HostSteps(NamedTuple):
    """Recorded steps as columns, microseconds."""

    num_reqs: _Floats
    num_prompt_step_tokens: _Floats
    """All tokens of a step with prompts; 0: it has none."""
    schedule: _Floats
    launch: _Floats
    update: _Floats
    was_idle: _Floats
    """1: the device had nothing to do when the launch began."""


def fit_host(recordings: Sequence[Recording], tokens: Sequence[int], nnls: Any) -> HostTimes:
    """``tokens``: those of the step model."""
    steps = _collect_steps(recordings)
    has_prompts = steps.num_prompt_step_tokens > 0
    tells_prompts = MIN_KIND_STEPS <= np.count_nonzero(has_prompts) <= len(has_prompts) - MIN_KIND_STEPS
    fitted: dict[str, float] = {}
    for part in _PARTS:
        times: _Floats = getattr(steps, part)
        usual = times <= np.percentile(times, 98)  # without pauses of the process
        if part == "launch" and tells_prompts:
            usual &= ~has_prompts
        columns = np.stack([np.ones(int(usual.sum())), steps.num_reqs[usual]], axis=1)
        constant, each = nnls(columns, times[usual])[0].tolist()
        fitted |= {f"{part}_us": round(constant, 3), f"{part}_request_us": round(each, 4)}
    prompt_launch_us: tuple[float, ...] = ()
    if tells_prompts:
        prompt_steps = _HostSteps(*(column[has_prompts] for column in steps))
        free = ~_find_blocked(prompt_steps)
        prompt_launch_us = _average_near(
            prompt_steps.num_prompt_step_tokens[free], prompt_steps.launch[free], np.array(tokens, np.float64)
        )
    gaps = list(_measure_gaps(recordings))
    leads = list(_measure_leads(recordings)) or [fitted["launch_us"]]
    arrivals = [delay for recording in recordings for delay in _estimate_arrival_delays(recording)]
    return HostTimes(
        **fitted,
        prompt_launch_us=prompt_launch_us,
        lead_us=round(max(float(np.median(leads)), 0.0), 3),
        gap_us=round(max(float(np.median(gaps)), 0.0), 3) if gaps else 0.0,
        arrival_us=round(max(float(np.mean(arrivals)), 0.0), 1) if arrivals else 0.0,
    )


def _collect_steps(recordings: Sequence[Recording]) -> _HostSteps:
    rows = []
    for recording in recordings:
        last_end_us = 0.0
        for step, done, num_reqs in recording.list_finished_steps():
            tokens = num_reqs if step.tokens is None else sum(step.tokens)
            times = (getattr(done, f"{part}_us") for part in _PARTS)
            was_idle = last_end_us <= done.start_us + done.schedule_us
            rows.append((num_reqs, tokens if step.num_decodes < num_reqs else 0, *times, was_idle))
            last_end_us = done.end_us
    return _HostSteps(*np.array(rows, np.float64).T)


def _find_blocked(steps: _HostSteps) -> NDArray[np.bool_]:
    """Launches that waited for the step before, because a device takes only so many kernels in advance: they took
    several times as long as those of steps of as many tokens that found it idle."""
    is_idle = steps.was_idle > 0
    if np.count_nonzero(is_idle) < _MEDIAN_OF:
        return np.zeros(len(is_idle), bool)
    order = np.argsort(steps.num_prompt_step_tokens[is_idle], kind="stable")
    tokens, launches = steps.num_prompt_step_tokens[is_idle][order], steps.launch[is_idle][order]
    windows = np.lib.stride_tricks.sliding_window_view
    medians = np.median(windows(launches, _MEDIAN_OF), axis=1)
    usual = np.interp(steps.num_prompt_step_tokens, np.median(windows(tokens, _MEDIAN_OF), axis=1), medians)
    return ~is_idle & (steps.launch > _BLOCKED * usual)


def _average_near(numbers: _Floats, times: _Floats, knots: _Floats) -> tuple[float, ...]:
    """The mean time at each knot, of the steps between its neighbours, the nearer the more."""
    hats = np.stack([np.interp(numbers, knots, row) for row in np.eye(len(knots))], axis=1)
    counts = hats.sum(axis=0)
    known = counts > 0
    means = (hats.T @ times)[known] / counts[known]
    return tuple(round(float(time), 1) for time in np.interp(knots, knots[known], means))


def _iter_pairs(recordings: Sequence[Recording]) -> Iterator[tuple[DoneRecord, DoneRecord]]:
    for recording in recordings:
        for (_, before, _), (_, done, _) in pairwise(recording.list_finished_steps()):
            yield before, done


def _measure_gaps(recordings: Sequence[Recording]) -> Iterator[float]:
    """Between two steps on a device that had both, and a host that waited: the step's end is the device's then."""
    for before, done in _iter_pairs(recordings):
        launched = done.start_us + done.schedule_us + done.held_us + done.launch_us
        if launched < before.end_us and done.wait_us > 0.1 * done.device_us:
            yield done.end_us - before.end_us - done.device_us


def _measure_leads(recordings: Sequence[Recording]) -> Iterator[float]:
    """From the beginning of a launch until the device began, where it was idle and the host waited for the step."""
    for before, done in _iter_pairs(recordings):
        if before.end_us <= done.start_us and done.wait_us > 0.1 * done.device_us:
            yield done.end_us - done.device_us - done.start_us - done.schedule_us


def _estimate_arrival_delays(recording: Recording) -> Iterator[float]:
    """Microseconds from a request's arrival until it reached the engine core. The core looks for messages between its
    steps: where one was in flight, the request came between two looks, in their middle on average."""
    steps = [done for _, done, _ in recording.list_finished_steps()]
    starts = [step.start_us for step in steps]
    last_ends = np.maximum.accumulate([step.end_us for step in steps]).tolist() if steps else []
    for record in recording.records:
        if not isinstance(record, ArrivalRecord):
            continue
        arrival, seen = record.arrival_ns / 1e3, record.seen_ns / 1e3
        index = bisect_left(starts, seen - 1) - 1  # the look before the one that saw it
        was_busy = index >= 0 and last_ends[index] > arrival
        earliest = starts[index] if was_busy else seen
        yield (earliest + seen) / 2 - arrival
