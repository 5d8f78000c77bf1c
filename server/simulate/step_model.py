"""What a step takes, by its shape: a table of measured times, as a JSON file.

    decodes alone = decodes_us(requests) + context * context_us + sqrt(context) * context_root_us
    with prompts  = tokens_us(tokens) + context * prompt_context_us + prefill_pairs * pair_us + mean_keys * mean_keys_us

The tables hold matrix products, which read all weights whatever the batch, and grow with it once they are bound by
arithmetic. Attention of decodes reads the KV of their context once, a short one at less than the memory's full rate
(hence the root); attention of prompts multiplies each query with
each key before it, and lasts at least as long as its longest query, which is worth more in short steps than in long
ones (``mean_keys``: pairs by prompt tokens).
"""

from __future__ import annotations

import difflib
import math
import os
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.core.errors import ConfigError
from quire.server.simulate.flags import DEFAULT_MODEL

__all__ = [
    "EngineLimits",
    "HostTimes",
    "StepHostTimes",
    "StepShape",
    "StepTimeModel",
    "check_writable",
    "list_shipped_models",
    "load_step_model",
    "save_step_model",
]

_MODEL_SCHEMA = 1


class StepShape(NamedTuple):
    """What the time of a step depends on."""

    num_reqs: int
    num_tokens: int
    context: int
    """Tokens of KV that decodes read, together."""
    prefill_pairs: int
    """Pairs of query and key of all other requests."""
    num_decodes: int

    @property
    def has_prompts(self) -> bool:
        """Whether it does more than decode one token each."""
        return self.num_decodes < self.num_reqs


class EngineLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The limits of the engine whose steps were measured; what a simulation uses unless it is told otherwise."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    block_size: int = 16
    num_blocks: int = 10000
    watermark: float = 0.01
    chunked_prefill: bool = True
    max_in_flight_steps: int = 2
    """Two: the next step is scheduled while one runs. One: the engine waits for each step."""


class HostTimes(msgspec.Struct, frozen=True, omit_defaults=True):
    """Microseconds of the host for a step: a constant, and so much more for each request."""

    schedule_us: float = 40.0
    schedule_request_us: float = 0.1
    launch_us: float = 60.0
    launch_request_us: float = 0.0
    prompt_launch_us: tuple[float, ...] = ()
    """To launch a step with prompts, at the numbers of ``StepTimeModel.tokens``; (): as any other."""
    lead_us: float | None = None
    """Of a launch, until the device begins with the step where it is idle: what it waits for later is part of its own
    time. None: the whole launch."""
    update_us: float = 20.0
    update_request_us: float = 0.1
    gap_us: float = 0.0
    """Between the end of a step on the device and its tokens on the host, or the next step's beginning."""
    arrival_us: float = 0.0
    """From a request's arrival in the API process to the engine core: template, tokens, a message."""
    output_us: float = 0.0
    """From tokens on the host to the client: text, a message, a socket."""


class StepHostTimes(NamedTuple):
    """Nanoseconds of the host for one step."""

    schedule_ns: int
    launch_ns: int
    update_ns: int
    lead_ns: int
    """Of the launch, until an idle device begins with the step."""


class StepTimeModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times of steps of one model on one device, with the limits of the engine that was measured."""

    name: str
    source: str
    """How its numbers came about: the command that measured them, or what they were derived from."""
    device: str
    model: str
    tokens: tuple[int, ...]
    """Numbers of tokens of which the time of a step is known, ascending."""
    tokens_us: tuple[float, ...]
    context_us: float
    pair_us: float
    context_root_us: float = 0.0
    prompt_context_us: float | None = None
    """None: ``context_us``."""
    mean_keys_us: float = 0.0
    decodes: tuple[int, ...] = ()
    """Numbers of requests of which the time of a step of decodes alone is known, ascending; (): that of as many tokens
    in ``tokens``."""
    decodes_us: tuple[float, ...] = ()
    pads_decodes: bool = False
    """A step of decodes takes as long as one of the next number in ``decodes``: it is padded, to the size of a CUDA
    graph. False: it lies between two numbers."""
    prompt_step_us: float = 0.0
    """Added to steps with prompts."""
    host: HostTimes = HostTimes()
    limits: EngineLimits = EngineLimits()
    fit: dict[str, float] = {}
    """Steps that were fitted, and by how much the model is off, as shares: ``median_error``, ``p95_error``."""
    schema: int = _MODEL_SCHEMA

    def knows_shape(self, shape: StepShape) -> bool:
        """Whether a step is no larger than those whose times are known; the time of a larger one is a guess."""
        sizes = self.tokens if shape.has_prompts or not self.decodes else self.decodes
        return shape.num_tokens <= sizes[-1]

    def describe_range(self) -> str:
        """The largest steps whose times are known."""
        return f"{(self.decodes or self.tokens)[-1]} decodes or {self.tokens[-1]} tokens"

    def device_ns(self, shape: StepShape) -> int:
        """Nanoseconds on the device."""
        if not shape.has_prompts:
            root_us = math.sqrt(shape.context) * self.context_root_us
            return round((self._decodes_us(shape.num_reqs) + shape.context * self.context_us + root_us) * 1e3)
        context_us = self.context_us if self.prompt_context_us is None else self.prompt_context_us
        mean_keys = shape.prefill_pairs / max(shape.num_tokens - shape.num_decodes, 1)
        attention_us = shape.context * context_us + shape.prefill_pairs * self.pair_us + mean_keys * self.mean_keys_us
        base_us = interpolate(self.tokens, self.tokens_us, shape.num_tokens) + self.prompt_step_us
        return round((base_us + attention_us) * 1e3)

    def decode_ns(self, num_reqs: int, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for steps of ``num_reqs`` decodes and nothing else, one for each entry of ``contexts``: equal to
        ``device_ns`` to the nanosecond."""
        root_us = np.sqrt(contexts) * self.context_root_us
        times: NDArray[np.int64] = np.rint((self._decodes_us(num_reqs) + contexts * self.context_us + root_us) * 1e3)
        return times.astype(np.int64)

    def host_ns(self, num_reqs: int, prompt_step_tokens: int = 0) -> StepHostTimes:
        """Nanoseconds of the host for a step of ``num_reqs`` requests; ``prompt_step_tokens``: all its tokens, if it
        has prompts."""
        host = self.host
        launch_us = host.launch_us + host.launch_request_us * num_reqs
        if prompt_step_tokens and host.prompt_launch_us:
            launch_us = float(np.interp(prompt_step_tokens, self.tokens, host.prompt_launch_us))
        lead_us = launch_us if host.lead_us is None else min(host.lead_us, launch_us)
        return StepHostTimes(
            round((host.schedule_us + host.schedule_request_us * num_reqs) * 1e3),
            round(launch_us * 1e3),
            round((host.update_us + host.update_request_us * num_reqs) * 1e3),
            round(lead_us * 1e3),
        )

    def scale_device_times(self, factor: float) -> StepTimeModel:
        """The same with steps that take ``factor`` times as long on the device."""
        changes: dict[str, Any] = {}
        for name in ("tokens_us", "decodes_us"):
            changes[name] = tuple(factor * time for time in getattr(self, name))
        for name in ("context_us", "context_root_us", "pair_us", "mean_keys_us", "prompt_step_us", "prompt_context_us"):
            if (time := getattr(self, name)) is not None:
                changes[name] = factor * time
        return msgspec.structs.replace(self, **changes)

    def _decodes_us(self, num_reqs: int) -> float:
        sizes, times = self.decodes, self.decodes_us
        if not sizes:
            return interpolate(self.tokens, self.tokens_us, num_reqs)
        if self.pads_decodes and num_reqs <= sizes[-1]:
            return times[bisect_left(sizes, num_reqs)]
        return interpolate(sizes, times, num_reqs)


def interpolate(numbers: tuple[int, ...], times: tuple[float, ...], number: int) -> float:
    """Between the numbers whose times are known, and beyond the last as between the last two."""
    high = min(max(bisect_right(numbers, number), 1), len(numbers) - 1)
    low = high - 1
    slope = (times[high] - times[low]) / (numbers[high] - numbers[low])
    return max(times[low] + slope * (number - numbers[low]), 0.0)


def list_shipped_models() -> list[str]:
    """The step models that come with Quire."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def load_step_model(name: str | None) -> StepTimeModel:
    """A step model from a file, or one that comes with Quire; None: the default. Raises ``ConfigError``."""
    shipped = list_shipped_models()
    chosen = DEFAULT_MODEL if name is None else name
    path = _folder() / f"{chosen}.json" if chosen in shipped else Path(chosen).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(chosen, shipped, n=1)
        hint = f"did you mean {close[0]}?" if close else f"name a file, or one of {', '.join(shipped)}"
        raise ConfigError(f"--step-model {chosen}: there is no such file or model; {hint}")
    try:
        model = msgspec.json.decode(path.read_bytes(), type=StepTimeModel)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--step-model {path}: not a step model: {error}; make one with quire simulate fit") from None
    _check_model(path, model)
    return model


def check_writable(path: Path) -> None:
    """Raises ``ConfigError`` where no step model can be written, before it takes minutes to make one."""
    folder = path.expanduser().absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"--out {path}: cannot be written; name a file in a folder that exists")


def save_step_model(model: StepTimeModel, path: Path) -> None:
    """Write a step model. Raises ``ConfigError``."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}; name a file that can be written") from None


def _check_model(path: Path, model: StepTimeModel) -> None:
    if model.schema != _MODEL_SCHEMA:
        raise ConfigError(f"--step-model {path} has schema {model.schema}; this version reads {_MODEL_SCHEMA}")
    _check_table(path, "tokens", model.tokens, model.tokens_us)
    if model.decodes or model.decodes_us:
        _check_table(path, "decodes", model.decodes, model.decodes_us)
    coefficients = [model.context_us, model.context_root_us, model.pair_us, model.prompt_step_us, model.mean_keys_us]
    if min([*model.tokens_us, *model.decodes_us, *coefficients, model.prompt_context_us or 0.0]) < 0:
        raise ConfigError(f"--step-model {path}: no time may be negative")
    if model.host.prompt_launch_us and len(model.host.prompt_launch_us) != len(model.tokens):
        raise ConfigError(f"--step-model {path}: prompt_launch_us needs as many entries as tokens")


def _check_table(path: Path, name: str, numbers: tuple[int, ...], times: tuple[float, ...]) -> None:
    if len(numbers) < 2 or len(numbers) != len(times):
        raise ConfigError(f"--step-model {path}: {name} and {name}_us need the same number of entries, two or more")
    if list(numbers) != sorted(set(numbers)):
        raise ConfigError(f"--step-model {path}: {name} must ascend")


def _folder() -> Path:
    return Path(__file__).with_name("models")
