"""What a step takes, by its shape: a table of measured times, as a JSON file.

    device = weights(tokens) + context * context_us + prefill_pairs * pair_us + requests * request_us [+ prompt_step_us]

``weights`` is interpolated between measured numbers of tokens: matrix products, which read all weights whatever the
batch, and grow with it once they are bound by arithmetic. Attention of decodes reads the KV of their context once;
attention of prompts multiplies each query with each key before it. The last term is of steps with prompts alone.
"""

from __future__ import annotations

import difflib
import os
from bisect import bisect_right
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
    has_prompts: bool


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
    update_us: float = 20.0
    update_request_us: float = 0.1
    gap_us: float = 0.0
    """Between the end of a step on the device and its tokens on the host, or the next step's beginning."""
    arrival_us: float = 0.0
    """From a request's arrival in the API process to the engine core: template, tokens, a message."""
    output_us: float = 0.0
    """From tokens on the host to the client: text, a message, a socket."""


class StepTimeModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times of steps of one model on one device, with the limits of the engine that was measured."""

    name: str
    source: str
    """How its numbers came about: the command that measured them, or what they were derived from."""
    device: str
    model: str
    tokens: tuple[int, ...]
    """Numbers of tokens of which the time of the weights is known, ascending."""
    tokens_us: tuple[float, ...]
    context_us: float
    pair_us: float
    request_us: float = 0.0
    prompt_step_us: float = 0.0
    host: HostTimes = HostTimes()
    limits: EngineLimits = EngineLimits()
    fit: dict[str, float] = {}
    """Steps that were fitted, and by how much the model is off, as shares: ``median_error``, ``p95_error``."""
    schema: int = _MODEL_SCHEMA

    def device_ns(self, shape: StepShape) -> int:
        """Nanoseconds on the device."""
        base = self._base_us(shape.num_reqs, shape.num_tokens)
        if shape.has_prompts:
            base += self.prompt_step_us
        return round((base + shape.context * self.context_us + shape.prefill_pairs * self.pair_us) * 1e3)

    def decode_ns(self, num_reqs: int, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for steps of ``num_reqs`` decodes and nothing else, one for each entry of ``contexts``: equal to
        ``device_ns`` to the nanosecond."""
        times: NDArray[np.int64] = np.rint((self._base_us(num_reqs, num_reqs) + contexts * self.context_us) * 1e3)
        return times.astype(np.int64)

    def host_ns(self, num_reqs: int) -> tuple[int, int, int]:
        """Nanoseconds to schedule, to launch and to update a step of ``num_reqs`` requests."""
        host = self.host
        return (
            round((host.schedule_us + host.schedule_request_us * num_reqs) * 1e3),
            round((host.launch_us + host.launch_request_us * num_reqs) * 1e3),
            round((host.update_us + host.update_request_us * num_reqs) * 1e3),
        )

    def _base_us(self, num_reqs: int, num_tokens: int) -> float:
        return self._interpolate_tokens(num_tokens) + num_reqs * self.request_us

    def _interpolate_tokens(self, num_tokens: int) -> float:
        """Between the measured numbers of tokens, and beyond the last as between the last two."""
        tokens, times = self.tokens, self.tokens_us
        high = min(max(bisect_right(tokens, num_tokens), 1), len(tokens) - 1)
        low = high - 1
        slope = (times[high] - times[low]) / (tokens[high] - tokens[low])
        return max(times[low] + slope * (num_tokens - tokens[low]), 0.0)


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
    numbers: list[Any] = [*model.tokens_us, model.context_us, model.pair_us, model.request_us, model.prompt_step_us]
    if model.schema != _MODEL_SCHEMA:
        raise ConfigError(f"--step-model {path} has schema {model.schema}; this version reads {_MODEL_SCHEMA}")
    if len(model.tokens) < 2 or len(model.tokens) != len(model.tokens_us):
        raise ConfigError(f"--step-model {path}: tokens and tokens_us need the same number of entries, two or more")
    if list(model.tokens) != sorted(set(model.tokens)) or min(numbers) < 0:
        raise ConfigError(f"--step-model {path}: tokens must ascend, and no time may be negative")


def _folder() -> Path:
    return Path(__file__).with_name("models")
