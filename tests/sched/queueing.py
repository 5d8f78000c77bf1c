"""Serves arrivals on a clock: what users wait, under a policy and a model of step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.contracts.policy import BatchingPolicy
from quire.core.messages import SchedulerOutput
from quire.core.scheduling_params import SchedulingParams
from quire.core.testing.simulated_engine import SimulatedEngine
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy


@dataclass(frozen=True)
class Arrival:
    """A request that comes at ``at_ms``. Its tokens are its own, unless it begins with a ``prefix``."""

    at_ms: float
    prompt_len: int
    max_tokens: int = 1
    priority: int = 0
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    prefix: Sequence[int] = ()


@dataclass
class Served:
    """What became of them, in the order of the arrivals; milliseconds, nan for those that were refused."""

    ttft_ms: np.ndarray
    response_ms: np.ndarray
    """From arrival to the last token."""
    gaps_ms: list[list[float]]
    """Between the tokens of each request."""
    num_cached: np.ndarray
    engine: SimulatedEngine


def serve(
    policy: BatchingPolicy,
    arrivals: Sequence[Arrival],
    step_time_ms: Callable[[SchedulerOutput], float],
    *,
    rows: int = 1,
    budget: int = 4096,
    num_blocks: int = 4000,
    max_model_len: int = 4096,
    chunked: bool = True,
) -> Served:
    """Serve all of them, one step at a time."""
    allocator = PagedAllocator((KVGroup(),), num_blocks, 16)
    config = SchedulerConfig(rows, budget, chunked_prefill=chunked)
    engine = SimulatedEngine(
        allocator, policy, FCFSPolicy(), config=config, max_model_len=max_model_len, max_in_flight=1,
        step_time_ms=step_time_ms,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    order = sorted(range(len(arrivals)), key=lambda i: arrivals[i].at_ms)
    coming = 0
    while coming < len(order) or engine.scheduler.has_unfinished_requests:
        while coming < len(order) and arrivals[order[coming]].at_ms * 1e6 <= engine.now_ns:
            index = order[coming]
            each = arrivals[index]
            own = rng.integers(0, 50, each.prompt_len - len(each.prefix)).tolist()
            engine.add_request(
                str(index), [*each.prefix, *own], max_tokens=each.max_tokens, priority=each.priority,
                scheduling=each.scheduling, arrival_ns=int(each.at_ms * 1e6),
            )  # fmt: skip
            coming += 1
        if engine.scheduler.has_unfinished_requests:
            engine.run_step()
        elif coming < len(order):
            engine.advance_clock(int(np.ceil(arrivals[order[coming]].at_ms * 1e6)))
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0
    times = [np.array(engine.token_times_ns[str(i)]) / 1e6 - each.at_ms for i, each in enumerate(arrivals)]
    cached = {int(output.request_id): output.num_cached_tokens for output in engine.outputs if output.num_cached_tokens}
    return Served(
        np.array([t[0] if len(t) else np.nan for t in times]),
        np.array([t[-1] if len(t) else np.nan for t in times]),
        [np.diff(t).tolist() for t in times],
        np.array([cached.get(engine.numbers[str(i)], 0) for i in range(len(arrivals))]),
        engine,
    )


def tokens_take_a_ms(step: SchedulerOutput) -> float:
    """A server of queueing theory: work is the only thing that takes time."""
    return float(step.total_num_scheduled_tokens)
