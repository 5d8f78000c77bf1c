"""Made-up traffic: arrival processes and length distributions, from a seed.

Both are written as ``name:key=value,key=value``; a length as ``name/number/number``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.errors import ConfigError
from quire.core.plugin.registry import suggest_names
from quire.server.traces.trace import MAX_REQUESTS, MAX_TOKENS, Trace, TraceRequest

__all__ = ["ARRIVALS", "LENGTHS", "make_arrivals", "make_synthetic_trace"]

_Floats = NDArray[np.float64]

ARRIVALS = {
    "poisson": "rate: independent arrivals",
    "gamma": "rate, cv (2): bursts; cv is the coefficient of variation of the gaps, 1 is poisson",
    "onoff": "rate, on (10), off (10): poisson at `rate` for `on` seconds, then nothing for `off`",
    "diurnal": "rate, period (86400), swing (0.8): poisson whose rate follows a sine",
    "uniform": "rate: equal gaps",
    "burst": "all at once",
}
"""Arrival processes and their parameters; ``rate`` is in requests a second."""

LENGTHS = {
    "fixed": "fixed/N",
    "uniform": "uniform/LEAST/MOST",
    "exponential": "exponential/MEAN",
    "lognormal": "lognormal/MEDIAN/SIGMA",
}
"""Distributions of lengths in tokens."""

_SYNTHETIC_KEYS = {
    "requests": "1000",
    "input": "lognormal/1024/0.8",
    "output": "lognormal/128/0.8",
    "prefixes": "0",
    "prefix_len": "512",
}


def make_arrivals(spec: str, count: int, seed: int = 0) -> list[float]:
    """``count`` times in seconds, ascending, by a spec such as ``gamma:rate=8,cv=3``. Raises ``ConfigError``."""
    name, values = _parse_spec(spec)
    if name not in ARRIVALS:
        raise ConfigError(f"arrivals {spec!r}: {name!r} is not a process; {suggest_names(name, ARRIVALS)}")
    defaults = {"gamma": {"cv": 2.0}, "onoff": {"on": 10.0, "off": 10.0}, "diurnal": {"period": 86400.0, "swing": 0.8}}
    numbers = {key: _parse_positive(spec, key, text) for key, text in values.items()}
    allowed = {*defaults.get(name, {}), *(() if name == "burst" else ("rate",))}
    if unknown := sorted(numbers.keys() - allowed):
        raise ConfigError(f"arrivals {spec!r}: {unknown[0]!r} is not a parameter; {name} takes {ARRIVALS[name]}")
    if name != "burst" and "rate" not in numbers:
        raise ConfigError(f"arrivals {spec!r}: say how many requests a second, as in {name}:rate=8")
    numbers = {**defaults.get(name, {}), **numbers}
    if numbers.get("swing", 0.0) > 1:
        raise ConfigError(f"arrivals {spec!r}: swing is a share of the rate, at most 1")
    times = _PROCESSES[name](np.random.default_rng([seed, 1]), count, **numbers)
    return [float(time) for time in times]


def make_synthetic_trace(spec: str, seed: int = 0) -> Trace:
    """A trace by a spec such as ``synthetic:requests=500,input=lognormal/1024/0.8,output=exponential/200``, its
    requests all at 0 s until ``Trace.replace_arrivals``. With ``prefixes=N,prefix_len=L`` each prompt begins with one
    of N shared prefixes of L tokens. Raises ``ConfigError``."""
    _, values = _parse_spec(spec)
    if unknown := sorted(values.keys() - _SYNTHETIC_KEYS.keys()):
        raise ConfigError(f"trace {spec!r}: {unknown[0]!r} is not known; {suggest_names(unknown[0], _SYNTHETIC_KEYS)}")
    values = {**_SYNTHETIC_KEYS, **values}
    count, num_prefixes, prefix_len = (
        round(_parse_positive(spec, key, values[key], least=least))
        for key, least in (("requests", 1), ("prefixes", 0), ("prefix_len", 1))
    )
    if count > MAX_REQUESTS:
        raise ConfigError(f"{spec!r}: requests must be at most {MAX_REQUESTS:,}, got {count:,}")
    rng = np.random.default_rng([seed, 2])
    prompts, outputs = (_draw_lengths(rng, spec, values[key], count) for key in ("input", "output"))
    chosen = rng.integers(0, num_prefixes, count) if num_prefixes else np.zeros(count, np.int64)
    requests = [
        TraceRequest(
            0.0,
            int(prompts[i]) + (prefix_len if num_prefixes else 0),
            int(outputs[i]),
            block_hashes=(int(chosen[i]),) if num_prefixes else (),
        )
        for i in range(count)
    ]
    return Trace("synthetic", requests, prefix_len if num_prefixes else 0, has_times=False)


def _draw_lengths(rng: np.random.Generator, spec: str, text: str, count: int) -> NDArray[np.int64]:
    name, *words = text.split("/")
    if name not in LENGTHS:
        raise ConfigError(f"trace {spec!r}: {name!r} is not a distribution; {suggest_names(name, LENGTHS)}")
    numbers = [_parse_positive(spec, name, word) for word in words]
    if len(numbers) != LENGTHS[name].count("/"):
        raise ConfigError(f"trace {spec!r}: write {LENGTHS[name]} in place of {text}")
    drawn: _Floats
    if name == "fixed":
        drawn = np.full(count, numbers[0])
    elif name == "uniform":
        least, most = sorted(int(min(each, 2.0 * MAX_TOKENS)) for each in numbers)
        drawn = rng.integers(least, most + 1, count).astype(np.float64)
    elif name == "exponential":
        drawn = rng.exponential(numbers[0], count)
    else:
        drawn = numbers[0] * np.exp(rng.normal(0.0, numbers[1], count))
    if drawn.max() > MAX_TOKENS:
        raise ConfigError(f"{spec!r}: {text} gives more than {MAX_TOKENS:,} tokens; name shorter lengths")
    lengths: NDArray[np.int64] = np.maximum(np.rint(drawn), 1).astype(np.int64)
    return lengths


def _poisson(rng: np.random.Generator, count: int, rate: float) -> _Floats:
    return rng.exponential(1 / rate, count).cumsum()


def _gamma(rng: np.random.Generator, count: int, rate: float, cv: float) -> _Floats:
    shape = 1 / cv**2
    return rng.gamma(shape, 1 / (rate * shape), count).cumsum()


def _onoff(rng: np.random.Generator, count: int, rate: float, on: float, off: float) -> _Floats:
    busy = _poisson(rng, count, rate)  # the clock of the busy periods alone
    return busy + np.floor(busy / on) * off


def _diurnal(rng: np.random.Generator, count: int, rate: float, period: float, swing: float) -> _Floats:
    """Thinning (Lewis and Shedler, 1979): of a process at the highest rate, each arrival is kept with the share that
    the rate of its moment has of it."""
    kept: list[float] = []
    now = 0.0
    while len(kept) < count:
        now += rng.exponential(1 / (rate * (1 + swing)))
        if rng.random() * (1 + swing) < 1 + swing * math.sin(2 * math.pi * now / period):
            kept.append(now)
    return np.array(kept)


def _uniform(rng: np.random.Generator, count: int, rate: float) -> _Floats:
    return np.arange(1, count + 1) / rate


def _burst(rng: np.random.Generator, count: int) -> _Floats:
    return np.zeros(count)


_PROCESSES: dict[str, Callable[..., Any]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "onoff": _onoff,
    "diurnal": _diurnal,
    "uniform": _uniform,
    "burst": _burst,
}


def _parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    name, _, rest = spec.partition(":")
    values: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise ConfigError(f"{spec!r}: {pair!r} is not of the form key=value")
        values[key.strip()] = value.strip()
    return name, values


def _parse_positive(spec: str, key: str, text: str, least: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{spec!r}: {key} must be a number, got {text!r}") from None
    if not math.isfinite(value) or value < least or (least == 0.0 and value <= 0 and key != "prefixes"):
        raise ConfigError(f"{spec!r}: {key} must be {'above 0' if not least else f'at least {least:g}'}, got {text}")
    return value
