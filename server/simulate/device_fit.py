"""What a step takes on the device, fitted to recorded steps: non-negative least squares.

Errors count in proportion to the root of a step's time, so that the sum of all steps is right: queues follow sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_KIND_STEPS", "DecodeFit", "DeviceSteps", "PromptFit", "fit_decodes", "fit_prompts"]

_Floats = NDArray[np.float64]

MIN_KIND_STEPS = 20
"""Steps of one kind, of decodes alone or with prompts, that it takes to tell it from the other."""
_MAX_KNOTS = 24
_OUTLIER = 0.5  # relative error beyond which a step is left out of the second pass, unless many have as much


class DeviceSteps(NamedTuple):
    """Recorded steps as columns."""

    num_reqs: _Floats
    num_tokens: _Floats
    context: _Floats
    prefill_pairs: _Floats
    num_decodes: _Floats
    device_us: _Floats

    def select(self, mask: NDArray[np.bool_]) -> DeviceSteps:
        """Some of them."""
        return DeviceSteps(*(column[mask] for column in self))


class DecodeFit(NamedTuple):
    """See the fields of ``StepTimeModel``."""

    decodes: tuple[int, ...]
    decodes_us: tuple[float, ...]
    context_us: float
    context_root_us: float


class PromptFit(NamedTuple):
    """See the fields of ``StepTimeModel``."""

    tokens: tuple[int, ...]
    tokens_us: tuple[float, ...]
    context_us: float
    pair_us: float
    mean_keys_us: float


def fit_decodes(steps: DeviceSteps, padded_sizes: Sequence[int], nnls: Any) -> DecodeFit:
    """Of steps of decodes alone. ``padded_sizes``: the numbers of requests to which they are padded, ascending; none:
    they are not. Sizes of which there were no steps lie on the line between their neighbours, and beyond the last on
    the line from the first to it."""
    sizes = np.array(padded_sizes, np.float64)
    contexts = np.stack([steps.context, np.sqrt(steps.context)], axis=1)
    if not len(sizes):
        knots = _choose_knots(steps.num_reqs)
        weights = _solve(np.concatenate([_make_hats(steps.num_reqs, knots), contexts], axis=1), steps, nnls)
        return DecodeFit(_to_ints(knots), _to_times(weights[:-2]), *weights[-2:].tolist())
    padded = sizes[np.minimum(np.searchsorted(sizes, steps.num_reqs), len(sizes) - 1)]
    known, counts = np.unique(padded, return_counts=True)
    known = known[counts >= 3] if (counts >= 3).any() else known
    keep = np.isin(padded, known)
    one_hot = (padded[keep, None] == known).astype(np.float64)
    columns = np.concatenate([one_hot, contexts[keep]], axis=1)
    weights = _solve(columns, steps.select(keep), nnls)
    times = np.interp(sizes, known, weights[:-2])
    slope = (weights[len(known) - 1] - weights[0]) / max(known[-1] - known[0], 1.0)
    times += np.maximum(sizes - known[-1], 0.0) * max(slope, 0.0)
    return DecodeFit(_to_ints(sizes), _to_times(times), *weights[-2:].tolist())


def fit_prompts(steps: DeviceSteps, nnls: Any) -> PromptFit:
    """Of steps with prompts."""
    knots = _choose_knots(steps.num_tokens)
    tokens = np.maximum(steps.num_tokens - steps.num_decodes, 1.0)
    others = np.stack([steps.context, steps.prefill_pairs, steps.prefill_pairs / tokens], axis=1)
    weights = _solve(np.concatenate([_make_stretches(steps.num_tokens, knots), others], axis=1), steps, nnls)
    times = weights[0] + np.concatenate(([0.0], np.cumsum(weights[1 : len(knots)])))
    return PromptFit(_to_ints(knots), _to_times(times), *weights[len(knots) :].tolist())


def _solve(columns: _Floats, steps: DeviceSteps, nnls: Any) -> _Floats:
    """Non-negative weights of the columns. First by relative errors, to find outliers; then without these."""
    times = steps.device_us
    keep = np.ones(len(times), bool)
    weights = np.zeros(columns.shape[1])
    for power in (1.0, 0.5):
        importance = times[keep] ** -power
        scaled = columns[keep] * importance[:, None]
        scale = np.maximum(scaled.max(axis=0), 1e-300)
        weights = nnls(scaled / scale, times[keep] * importance)[0] / scale
        errors = columns @ weights / times - 1
        deviations = np.abs(errors - np.median(errors))
        keep = deviations <= max(6 * float(np.median(deviations)), _OUTLIER)
    return weights


def _choose_knots(numbers: _Floats) -> _Floats:
    """Numbers with as many steps between any two of them, and the least and the most."""
    knots = np.unique(np.quantile(numbers, np.linspace(0, 1, _MAX_KNOTS)).round())
    return knots if len(knots) > 1 else np.array([knots[0], knots[0] + 1])


def _make_stretches(numbers: _Floats, knots: _Floats) -> _Floats:
    """Columns whose weights are the time at the first knot, and what each stretch between two knots adds."""
    stretches = np.clip((numbers[:, None] - knots[:-1]) / np.diff(knots), 0, 1)
    return np.concatenate([np.ones((len(numbers), 1)), stretches], axis=1)


def _make_hats(numbers: _Floats, knots: _Floats) -> _Floats:
    """Columns whose weights are the times at the knots."""
    return np.stack([np.interp(numbers, knots, row) for row in np.eye(len(knots))], axis=1)


def _to_ints(knots: _Floats) -> tuple[int, ...]:
    return tuple(int(knot) for knot in knots)


def _to_times(times: _Floats) -> tuple[float, ...]:
    return tuple(round(float(time), 3) for time in times)
