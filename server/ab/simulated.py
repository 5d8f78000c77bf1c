"""A/B tests in virtual time: both arms on the same stretches of a trace, or a simulated switchback."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from quire.core.errors import ConfigError
from quire.server.ab.observations import ArmTimes
from quire.server.simulate.results import RequestTimes
from quire.server.simulate.simulation import EngineSetup, SimulatedServer, run_simulation
from quire.server.traces.trace import Trace

__all__ = [
    "Block",
    "cut_to_blocks",
    "cut_windows",
    "plan_blocks",
    "repeat_arrivals",
    "run_paired_simulation",
    "run_switchback_simulation",
    "select_measured",
]


class Block(NamedTuple):
    """A stretch of time in which one arm serves."""

    pair: int
    arm: int
    start_s: float
    end_s: float

    def get_measured(self, washout_s: float) -> tuple[float, float]:
        """The part whose arrivals count: neither those that meet requests of the block before, nor those that may be
        served in the next."""
        return self.start_s + washout_s, self.end_s - washout_s


def plan_blocks(num_pairs: int, block_s: float, seed: int) -> list[Block]:
    """Pairs of blocks, A and B in random order in each."""
    first = np.random.default_rng([seed, 4]).integers(0, 2, num_pairs).tolist()
    arms = [arm for b_first in first for arm in ((1, 0) if b_first else (0, 1))]
    return [Block(i // 2, arm, i * block_s, (i + 1) * block_s) for i, arm in enumerate(arms)]


def cut_to_blocks(trace: Trace, blocks: Sequence[Block]) -> Trace:
    """The traffic of the blocks. Raises ``ConfigError`` for a trace that ends before them."""
    end_s = blocks[-1].end_s
    if trace.duration_s < end_s * 0.9:
        raise ConfigError(
            f"the trace lasts {trace.duration_s:,.0f} s, and {len(blocks)} blocks take {end_s:,.0f} s; give "
            "fewer --pairs, a shorter --block, or a longer trace"
        )
    return trace.cut_window(0.0, end_s)


def repeat_arrivals(trace: Trace, blocks: Sequence[Block]) -> Trace:
    """The same arrivals and lengths in both blocks of each pair: the first's, so that a burst in one of them is no
    difference between the arms. A trace that knows of shared prefixes is left as it is, because the second block would
    find those of the first in the cache."""
    if trace.hash_block_size or any(request.prompt_id is not None for request in trace.requests):
        return trace
    repeated = []
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        requests = [request for request in trace.requests if first.start_s <= request.arrival_s < first.end_s]
        later = second.start_s - first.start_s
        repeated += requests
        repeated += [dataclasses.replace(request, arrival_s=request.arrival_s + later) for request in requests]
    return dataclasses.replace(trace, requests=repeated) if repeated else trace


def cut_windows(trace: Trace, num_pairs: int, make_again: Callable[[int], Trace] | None) -> list[Trace]:
    """Stretches of traffic: as many parts of the trace, or, where it is made up (``make_again``), as many traces of
    other seeds."""
    if make_again is not None:
        return [make_again(number) for number in range(num_pairs)]
    length = trace.duration_s / num_pairs
    windows = []
    for number in range(num_pairs):
        start = number * length
        kept = [
            dataclasses.replace(request, arrival_s=request.arrival_s - start)
            for request in trace.requests
            if start <= request.arrival_s < start + length
        ]
        windows.append(dataclasses.replace(trace, requests=kept))
    return [window for window in windows if len(window)]


def run_paired_simulation(windows: Sequence[Trace], arms: Sequence[EngineSetup], washout_s: float) -> list[ArmTimes]:
    """Each stretch through both arms, from an idle engine; arrivals before ``washout_s`` are not measured. Raises
    ``ConfigError`` where a policy was quarantined."""
    measured = []
    for pair, window in enumerate(windows):
        for arm, setup in enumerate(arms):
            result = run_simulation(window, setup)
            _check_quarantines(result.quarantined)
            times = result.times
            end = float(times.arrival_s[-1])
            measured.append(ArmTimes(pair, arm, max(end - washout_s, 1e-9), select_measured(times, washout_s, end + 1)))
    return measured


def run_switchback_simulation(
    trace: Trace, arms: Sequence[EngineSetup], blocks: Sequence[Block], washout_s: float
) -> list[ArmTimes]:
    """One engine whose policy changes at the beginning of each block, as a live one's does. Arms may have other step
    models, but the engine is that of the first."""
    trace = cut_to_blocks(trace, blocks)
    server = SimulatedServer(trace, arms[0])
    for block in blocks:
        setup = arms[block.arm]
        server.switch(block.start_s, setup.make_policy(), setup.policy_name, setup.model)
        server.serve_arrivals(block.end_s)
    times = server.finish()
    _check_quarantines(server.make_result(times, 0.0).quarantined)
    measured = []
    for block in blocks:
        start, end = block.get_measured(washout_s)
        measured.append(ArmTimes(block.pair, block.arm, end - start, select_measured(times, start, end)))
    return measured


def _check_quarantines(quarantined: Sequence[str]) -> None:
    if quarantined:
        raise ConfigError(
            f"a policy was quarantined ({quarantined[0]}), and the one that took over would be measured in its place; "
            "mend it, and run quire plugins check policy/NAME"
        )


def select_measured(times: RequestTimes, start_s: float, end_s: float) -> RequestTimes:
    """The requests that arrive in ``[start_s, end_s)``."""
    chosen = ((times.arrival_s >= start_s) & (times.arrival_s < end_s)).nonzero()[0]
    columns = {
        field.name: getattr(times, field.name)[chosen] for field in dataclasses.fields(times) if field.name != "groups"
    }
    groups = [times.groups[i] for i in chosen.tolist()] if times.groups else ()
    return RequestTimes(**columns, groups=groups)
