"""How benchmarks print what they found."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.version import __version__

__all__ = ["environment", "percentiles", "print_json", "print_table"]


def environment(device: str) -> dict[str, str]:
    """What a figure must be read beside: versions and the device's name."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    threads = "" if device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    return {"quire": __version__, "torch": torch.__version__, "device": name + threads}


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
