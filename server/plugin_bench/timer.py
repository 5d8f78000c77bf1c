"""The one timer of kernels: of ``quire plugins bench`` and of the scripts in ``benchmarks/kernels``.

On a GPU a CUDA graph holds many launches, which go through so much memory that none finds its inputs in the L2 cache;
a replay is timed by events on the device, and queued while that is busy: the host's time to launch it does not count.
On a CPU the same launches run eagerly by the wall clock, which says nothing about a GPU. What runs on the host alone is
timed by the CPU time of its thread: other work on the machine tells less.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "L2_BYTES",
    "MIN_ROUNDS",
    "TURN_S",
    "WARM_UP_S",
    "Ratio",
    "compare_rounds",
    "make_timer",
    "run_alternately",
    "time_graph",
]

L2_BYTES = 256 << 20
"""Launches of one timed run go through at least this much memory, which is more than any GPU's L2 cache holds."""

WARM_UP_S = 0.2
"""How long a GPU runs what is timed before that counts, so that its clock is what heat and power allow."""
TURN_S = 0.05
"""How long one of several timers has a GPU before the next does: what ran before has left neither its data in the L2
cache nor its clock, which follows the power that kernels draw within some milliseconds."""
MIN_ROUNDS = 6
"""Rounds of which order statistics give an interval of 95 %."""
_HEAD_START_CYCLES = 400_000
"""Some 0.2 ms, in which the host queues both events and what is between them."""


def make_timer(launch: Callable[[], object], device: torch.device, *, capture: bool = True) -> Callable[[], float]:
    """What runs all that ``launch`` launches and returns the seconds that it took.

    It is launched once before, so that kernels are compiled. Without ``capture`` it is launched eagerly on a GPU too.
    """
    launch()
    if device.type != "cuda":
        return lambda: _time_on_host(launch)
    torch.cuda.synchronize()
    replay = launch
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    return lambda: _time_on_device(replay)


def time_graph(launch: Callable[[], object], num_launches: int = 1, repeats: int = 9, num_warmups: int = 2) -> float:
    """Median seconds of one of the ``num_launches`` launches that ``launch`` makes, in a CUDA graph."""
    timer = make_timer(launch, torch.device("cuda"))
    deadline = time.perf_counter() + (WARM_UP_S if num_warmups else 0.0)
    for _ in range(num_warmups):
        timer()
    while time.perf_counter() < deadline:
        timer()
    return statistics.median(timer() for _ in range(repeats)) / num_launches


def run_alternately(
    timers: Mapping[str, Callable[[], float]], num_rounds: int, warm_up_s: float = 0.0, turn_s: float = 0.0
) -> dict[str, list[float]]:
    """The seconds of each timer in each round. All take turns, and every other round turns the order around, so that a
    machine that grows hot or busy does so to all of them. A turn is one call, or as many as fill ``turn_s``, of which
    the median of the later half counts. A round before the first, and more for ``warm_up_s`` by the wall clock, are
    not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    deadline, number = time.perf_counter() + warm_up_s, -1
    while number < num_rounds:
        for name, timer in list(timers.items())[:: 1 if number % 2 else -1]:
            measured = _take_turn(timer, turn_s)
            if number >= 0:
                seconds[name].append(measured)
        if number >= 0 or time.perf_counter() >= deadline:
            number += 1
    return seconds


def _take_turn(timer: Callable[[], float], turn_s: float) -> float:
    deadline, measured = time.perf_counter() + turn_s, [timer()]
    while time.perf_counter() < deadline:
        measured.append(timer())
    return statistics.median(measured[len(measured) // 2 :])


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one takes as another, with the 95 % interval of the median."""

    median: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1 <= self.high


def compare_rounds(seconds: Sequence[float], others: Sequence[float]) -> Ratio:
    """``seconds`` over ``others``, round by round. The interval is that of order statistics, which assumes nothing of
    how times are distributed; of fewer than ``MIN_ROUNDS`` it is their range, and covers less than 95 %."""
    ratios = sorted(a / b for a, b in zip(seconds, others, strict=True))
    count = len(ratios)
    left_out, covered = 0, 0.0
    while left_out < (count - 1) // 2:
        covered += math.comb(count, left_out) / 2**count
        if covered > 0.025:
            break
        left_out += 1
    trimmed = max(left_out - 1, 0) if covered > 0.025 else left_out
    return Ratio(statistics.median(ratios), ratios[trimmed], ratios[count - 1 - trimmed])


def _time_on_device(replay: Callable[[], object]) -> float:
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _time_on_host(launch: Callable[[], object]) -> float:
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start
