"""How much slower the clock runs than processors: what else runs on the machine."""

from __future__ import annotations

import time

__all__ = ["measure_slowdown"]


def measure_slowdown(seconds: float = 0.05) -> float:
    """Time by the clock for each second of processor time, at least 1."""
    start, cpu_start = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu_start < seconds:
        pass
    return max((time.monotonic() - start) / seconds, 1.0)
