"""Fits a step model to recorded steps: non-negative least squares of relative errors."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.core.errors import ConfigError
from quire.core.traces.records import ArrivalRecord, DoneRecord, StepRecord
from quire.server.simulate.step_model import EngineLimits, HostTimes, StepShape, StepTimeModel
from quire.server.traces.recording import Recording

__all__ = ["MIN_STEPS", "FitReport", "fit_step_model", "import_scipy", "measure_errors"]

MIN_STEPS = 200
"""Recorded steps that a fit needs."""

_Floats = NDArray[np.float64]
_MAX_KNOTS = 16
_OUTLIER = 4.0  # median absolute deviations of the relative error beyond which a step is left out of the second pass


class FitReport(NamedTuple):
    """By how much a step model is off on recorded steps, as shares of their time on the device."""

    num_steps: int
    median_error: float
    p95_error: float
    bias: float
    """Of the sum of all steps: above 0 the model is too slow."""


class _Steps(NamedTuple):
    num_reqs: _Floats
    num_tokens: _Floats
    context: _Floats
    prefill_pairs: _Floats
    has_prompts: _Floats
    device_us: _Floats


def fit_step_model(recordings: Sequence[Recording], name: str, source: str) -> StepTimeModel:
    """The step model of the engine that was recorded. Raises ``ConfigError``: too few steps, other limits in each."""
    scipy_optimize = import_scipy("optimize", "quire simulate fit")
    headers = [recording.header for recording in recordings]
    for header, recording in zip(headers[1:], recordings[1:], strict=True):
        if (header.model, header.dtype, header.device) != (headers[0].model, headers[0].dtype, headers[0].device):
            raise ConfigError(
                f"{recording.name} is of {header.model} in {header.dtype}, {recordings[0].name} of "
                f"{headers[0].model} in {headers[0].dtype}; fit one model at a time"
            )
    steps = _collect_steps(recordings)
    if len(steps.device_us) < MIN_STEPS:
        raise ConfigError(f"{len(steps.device_us)} recorded steps are too few for a fit; {MIN_STEPS} are needed")
    knots = _choose_knots(steps.num_tokens)
    columns = _make_columns(steps, knots)
    keep = np.ones(len(steps.device_us), bool)
    weights = np.zeros(columns.shape[1])
    for _ in range(2):  # the second time without outliers
        scaled = columns[keep] / steps.device_us[keep, None]
        scale = np.maximum(scaled.max(axis=0), 1e-300)
        weights = scipy_optimize.nnls(scaled / scale, np.ones(int(keep.sum())))[0] / scale
        errors = columns @ weights / steps.device_us - 1
        deviation = np.median(np.abs(errors - np.median(errors)))
        keep = np.abs(errors - np.median(errors)) <= _OUTLIER * max(float(deviation), 0.01)
    base = weights[0] + np.concatenate(([0.0], np.cumsum(weights[1 : len(knots)])))
    context_us, pair_us, prompt_step_us = weights[len(knots) :].tolist()
    header = headers[0]
    model = StepTimeModel(
        name=name,
        source=source,
        device=header.device,
        model=f"{header.model}, {header.dtype}",
        tokens=tuple(int(knot) for knot in knots),
        tokens_us=tuple(round(float(value), 3) for value in base),
        context_us=context_us,
        pair_us=pair_us,
        prompt_step_us=prompt_step_us,
        host=_fit_host(recordings, scipy_optimize.nnls),
        limits=_read_limits(header.engine),
    )
    report = measure_errors(model, recordings)
    fit = {name: round(value, 6) for name, value in report._asdict().items()}
    return msgspec.structs.replace(model, fit=fit)


def measure_errors(model: StepTimeModel, recordings: Sequence[Recording]) -> FitReport:
    """How well a step model tells the times of recorded steps."""
    steps = _collect_steps(recordings)
    shapes = zip(*(column.tolist() for column in steps[:5]), strict=True)
    predicted = np.array(
        [model.device_ns(StepShape(int(r), int(t), int(c), int(p), bool(h))) / 1e3 for r, t, c, p, h in shapes]
    )
    errors = np.abs(predicted / steps.device_us - 1)
    return FitReport(
        len(errors),
        float(np.median(errors)),
        float(np.percentile(errors, 95)),
        float(predicted.sum() / steps.device_us.sum() - 1),
    )


def import_scipy(module: str, what: str) -> Any:
    """``scipy.<module>``. Raises ``ConfigError`` where the extra is not installed."""
    import importlib

    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise ConfigError(f"{what} needs scipy; pip install 'quire[ab]'") from None


def _collect_steps(recordings: Sequence[Recording]) -> _Steps:
    rows: list[tuple[float, ...]] = []
    for recording in recordings:
        for step, done, num_reqs in recording.list_finished_steps():
            num_tokens = num_reqs if step.tokens is None else sum(step.tokens)
            if done.device_us > 0:
                has_prompts = float(step.num_decodes < num_reqs)
                rows.append((num_reqs, num_tokens, step.context, step.prefill_pairs, has_prompts, done.device_us))
    table = np.array(rows, np.float64).reshape(-1, len(_Steps._fields))
    return _Steps(*table.T)


def _choose_knots(num_tokens: _Floats) -> _Floats:
    """Powers of two within the recorded numbers of tokens, and these numbers' ends: each with steps near it."""
    low, high = float(num_tokens.min()), float(num_tokens.max())
    if low == high:
        high = low + 1
    powers = [float(2**k) for k in range(1, 18) if low < 2**k < high]
    counted = [p for p in powers if np.count_nonzero((num_tokens > p / 1.5) & (num_tokens < p * 1.5)) >= 3]
    return np.array([low, *counted[-(_MAX_KNOTS - 2) :], high])


def _make_columns(steps: _Steps, knots: _Floats) -> _Floats:
    """The weights of the model are the coefficients: a constant, what each stretch between two knots adds, context,
    pairs, and steps with prompts."""
    widths = np.diff(knots)
    stretches = np.clip((steps.num_tokens[:, None] - knots[:-1]) / widths, 0, 1)
    ones = np.ones((len(steps.num_tokens), 1))
    others = np.stack([steps.context, steps.prefill_pairs, steps.has_prompts], axis=1)
    return np.concatenate([ones, stretches, others], axis=1)


def _fit_host(recordings: Sequence[Recording], nnls: Any) -> HostTimes:
    finished: list[tuple[StepRecord, DoneRecord, int]] = []
    gaps: list[float] = []
    arrivals: list[float] = []
    for recording in recordings:
        steps = recording.list_finished_steps()
        finished += steps
        for (_, before, _), (_, done, _) in pairwise(steps):
            launched = done.start_us + done.schedule_us + done.held_us + done.launch_us
            if done.wait_us > 0.1 * done.device_us:  # the host waited: the step's end is the device's
                gaps.append(done.end_us - max(launched, before.end_us) - done.device_us)
        arrivals += _estimate_arrival_delays(recording, [done for _, done, _ in steps])
    num_reqs = np.array([count for _, _, count in finished], np.float64)
    fitted: dict[str, float] = {}
    for part in ("schedule", "launch", "update"):
        times = np.array([getattr(done, f"{part}_us") for _, done, _ in finished])
        usual = times <= np.percentile(times, 98)  # without pauses of the process
        columns = np.stack([np.ones(int(usual.sum())), num_reqs[usual]], axis=1)
        constant, each = nnls(columns, times[usual])[0].tolist()
        fitted |= {f"{part}_us": round(constant, 3), f"{part}_request_us": round(each, 4)}
    return HostTimes(
        **fitted,
        gap_us=round(max(float(np.median(gaps)), 0.0), 3) if gaps else 0.0,
        arrival_us=round(max(float(np.mean(arrivals)), 0.0), 1) if arrivals else 0.0,
    )


def _estimate_arrival_delays(recording: Recording, steps: list[DoneRecord]) -> list[float]:
    """Microseconds from a request's arrival until it reached the engine core. The core looks for messages between its
    steps: where one was in flight, the request came between two looks, in their middle on average."""
    starts = [step.start_us for step in steps]
    last_ends = np.maximum.accumulate([step.end_us for step in steps]).tolist() if steps else []
    delays = []
    for record in recording.records:
        if not isinstance(record, ArrivalRecord):
            continue
        arrival, seen = record.arrival_ns / 1e3, record.seen_ns / 1e3
        index = bisect_left(starts, seen - 1) - 1  # the look before the one that saw it
        was_busy = index >= 0 and last_ends[index] > arrival
        earliest = starts[index] if was_busy else seen
        delays.append((earliest + seen) / 2 - arrival)
    return delays


def _read_limits(engine: dict[str, Any]) -> EngineLimits:
    names = [name for name in EngineLimits.__struct_fields__ if engine.get(name) is not None]
    return EngineLimits(**{name: engine[name] for name in names})
