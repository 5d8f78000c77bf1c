"""Fits a step model to recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from quire.core.errors import ConfigError
from quire.core.traces.records import HeaderRecord
from quire.core.worker.cuda_graphs.capture_sizes import choose_capture_sizes
from quire.server.simulate.device_fit import MIN_KIND_STEPS, DeviceSteps, fit_decodes, fit_prompts
from quire.server.simulate.host_fit import fit_host
from quire.server.simulate.step_model import EngineLimits, StepShape, StepTimeModel
from quire.server.traces.recording import Recording

__all__ = ["MIN_STEPS", "FitReport", "fit_step_model", "import_scipy", "measure_errors"]

MIN_STEPS = 200
"""Recorded steps that a fit needs."""


class FitReport(NamedTuple):
    """By how much a step model is off on recorded steps, as shares of their time on the device."""

    num_steps: int
    median_error: float
    p95_error: float
    bias: float
    """Of the sum of all steps: above 0 the model is too slow."""


def fit_step_model(recordings: Sequence[Recording], name: str, source: str) -> StepTimeModel:
    """The step model of the engine that was recorded. Raises ``ConfigError``: too few steps, other limits in each."""
    nnls = import_scipy("optimize", "quire simulate fit").nnls
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
    header = headers[0]
    is_decode = steps.num_decodes == steps.num_reqs
    kinds = [int(np.count_nonzero(is_decode)), int(np.count_nonzero(~is_decode))]
    prompts = fit_prompts(steps if min(kinds) < MIN_KIND_STEPS else steps.select(~is_decode), nnls)
    sizes = _list_padded_sizes(header)
    decodes = None if min(kinds) < MIN_KIND_STEPS else fit_decodes(steps.select(is_decode), sizes, nnls)
    model = StepTimeModel(
        name=name,
        source=source,
        device=header.device,
        model=f"{header.model}, {header.dtype}",
        tokens=prompts.tokens,
        tokens_us=prompts.tokens_us,
        context_us=prompts.context_us if decodes is None else decodes.context_us,
        context_root_us=0.0 if decodes is None else decodes.context_root_us,
        pair_us=prompts.pair_us,
        prompt_context_us=prompts.context_us,
        mean_keys_us=prompts.mean_keys_us,
        decodes=() if decodes is None else decodes.decodes,
        decodes_us=() if decodes is None else decodes.decodes_us,
        pads_decodes=bool(sizes) and decodes is not None,
        host=fit_host(recordings, prompts.tokens, nnls),
        limits=_read_limits(header.engine),
    )
    report = measure_errors(model, recordings)
    fit = {name: round(value, 6) for name, value in report._asdict().items()}
    return msgspec.structs.replace(model, fit=fit)


def measure_errors(model: StepTimeModel, recordings: Sequence[Recording]) -> FitReport:
    """How well a step model tells the times of recorded steps."""
    steps = _collect_steps(recordings)
    shapes = zip(*(column.astype(np.int64).tolist() for column in steps[:5]), strict=True)
    predicted = np.array([model.device_ns(StepShape(*shape)) / 1e3 for shape in shapes])
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


def _collect_steps(recordings: Sequence[Recording]) -> DeviceSteps:
    rows: list[tuple[float, ...]] = []
    for recording in recordings:
        for step, done, num_reqs in recording.list_finished_steps():
            num_tokens = num_reqs if step.tokens is None else sum(step.tokens)
            if done.device_us > 0:
                rows.append((num_reqs, num_tokens, step.context, step.prefill_pairs, step.num_decodes, done.device_us))
    table = np.array(rows, np.float64).reshape(-1, len(DeviceSteps._fields))
    return DeviceSteps(*table.T)


def _list_padded_sizes(header: HeaderRecord) -> list[int]:
    """The numbers of requests to which a GPU's steps of decodes are padded: the sizes of the CUDA graphs."""
    if "cpu" in header.device.lower() or header.engine.get("enforce_eager", True):
        return []
    return choose_capture_sizes(int(header.engine["max_num_seqs"]))


def _read_limits(engine: dict[str, Any]) -> EngineLimits:
    names = [name for name in EngineLimits.__struct_fields__ if engine.get(name) is not None]
    return EngineLimits(**{name: engine[name] for name in names})
