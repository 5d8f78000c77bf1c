"""How benchmarks print what they found."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from quire.core.version import __version__

__all__ = ["device_name", "environment", "percentiles", "print_json", "print_table", "progress"]


def environment(device: str) -> dict[str, str]:
    """What a figure must be read beside: versions and the device's name."""
    import torch

    return {"quire": __version__, "torch": torch.__version__, "device": device_name(device)}


def device_name(device: str) -> str:
    """By which its ceilings are known; of a CPU, with the threads that torch uses."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def progress(total: int, what: str, unit: str = "req") -> tqdm[Any]:
    """A bar on stderr, if that is a terminal."""
    return tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"mean": statistics.fmean(ordered), "p50": statistics.median(ordered), "p99": last}


def print_table(rows: Mapping[str, str]) -> None:
    """Two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def print_json(found: Mapping[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(found), flush=True)
