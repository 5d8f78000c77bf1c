"""How benchmarks print their figures."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from quire.core.version import __version__

__all__ = [
    "collect_speculation",
    "compute_percentiles",
    "describe_environment",
    "format_speculation",
    "get_device_name",
    "make_progress_bar",
    "print_json",
    "print_table",
]


def describe_environment(device: str) -> dict[str, str]:
    """What a figure depends on: versions and the device's name."""
    import torch

    return {"quire": __version__, "torch": torch.__version__, "device": get_device_name(device)}


def get_device_name(device: str) -> str:
    """By which its ceilings are known; of a CPU, with the threads that torch uses."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def make_progress_bar(total: int, what: str, unit: str = "req") -> tqdm[Any]:
    """A bar on stderr, if that is a terminal."""
    return tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def compute_percentiles(values: Sequence[float]) -> dict[str, float]:
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


def print_json(figures: Mapping[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(figures), flush=True)


def collect_speculation(stats: Mapping[str, float]) -> dict[str, Any]:
    """Acceptance of draft tokens, from the statistics of an engine; empty if none was verified."""
    drafted = stats.get("spec_decode_num_draft_tokens_total", 0.0)
    if not drafted:
        return {}
    by_position: list[float] = []
    while at := stats.get(f"spec_decode_drafted_at_{len(by_position)}_total"):
        by_position.append(stats[f"spec_decode_accepted_at_{len(by_position)}_total"] / at)
    return {
        "draft_tokens": int(drafted),
        "accepted_tokens": int(stats["spec_decode_num_accepted_tokens_total"]),
        "acceptance_rate": stats["spec_decode_draft_acceptance_rate"],
        "acceptance_by_position": by_position,
        "tokens_per_step": stats["spec_decode_efficiency"],
    }


def format_speculation(figures: Mapping[str, Any]) -> str:
    """The figures of ``collect_speculation`` as a line of text."""
    places = ", ".join(f"{share:.0%}" for share in figures["acceptance_by_position"])
    return (
        f"speculation: {figures['accepted_tokens']:,} of {figures['draft_tokens']:,} drafted tokens accepted "
        f"({figures['acceptance_rate']:.1%}; by position {places}), {figures['tokens_per_step']:.2f} tokens a step"
    )
