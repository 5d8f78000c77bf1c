"""Host time of a step in the scheduler: 256 requests decode, with and without a long queue. No GPU is needed.

    PYTHONPATH=src python benchmarks/scheduler_host_cost.py

``schedule`` and ``update`` are the two calls of a step. Each request has two stop tokens, blocks are of 16 tokens, and
one step is always in flight, as in the engine. In ``churn`` one request ends and one is admitted in every step. Figures
are medians; ``p10`` is of the sum, and nearer the truth on a machine that has other work. The loop printed first tells
how fast the machine is just now.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import timeit
from collections import deque

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.messages import EngineCoreRequest, SchedulerOutput
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.plugin_bench.host_benches import make_output

BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, nargs="*", default=[0, 100_000])
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    loop = min(timeit.repeat("for x in range(256): pass", number=1000, repeat=20)) * 1e3
    print(f"a Python loop over 256 numbers: {loop:.1f} us")
    print(
        f"{'running':>8} {'waiting':>8} {'':8} {'schedule':>9} {'update':>9} {'sum':>9} {'p10':>9} {'p99':>9}"
        "   us a step"
    )
    for churn in (False, True):
        for waiting in args.waiting:
            scheduled, updated = measure(args.running, waiting, args.steps, churn)
            both = [a + b for a, b in zip(scheduled, updated, strict=True)]
            figures = [statistics.median(scheduled), statistics.median(updated), statistics.median(both)]
            figures += np.percentile(both, (10, 99)).tolist()
            cells = " ".join(f"{1e6 * figure:9.1f}" for figure in figures)
            print(f"{args.running:>8} {waiting:>8} {'churn' if churn else 'decode':8} {cells}")


def measure(running: int, waiting: int, steps: int, churn: bool) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(0)
    max_model_len = 4096
    blocks = 1 + (running + 8) * max_model_len // BLOCK
    allocator = PagedAllocator([KVGroup()], blocks, BLOCK)
    scheduler = Scheduler(
        SchedulerConfig(running, 8192),
        CacheConfig(BLOCK, blocks),
        allocator,
        FCFSPolicy(),
        fallback=FCFSPolicy(),
        max_model_len=max_model_len,
    )
    queued = waiting + (steps + 100 if churn else 0)
    for i in range(running + queued):
        prompt = rng.integers(0, 1000, 16 + i % 16).tolist()
        tokens = 2000 if not churn else 1 + (i if i < running else running)
        params = SamplingParams(max_tokens=tokens, stop_token_ids=[1001], seed=i)
        scheduler.add_request(EngineCoreRequest(i, prompt, params, i, [1000]))
    gc.collect()
    gc.freeze()  # as the engine does after its start
    in_flight: deque[SchedulerOutput] = deque()
    scheduled, updated = [], []
    for number in range(steps + 64):
        began = time.perf_counter()
        step = scheduler.schedule()
        duration = time.perf_counter() - began
        assert step is not None
        in_flight.append(step)
        if len(in_flight) < 2:
            continue
        output = make_output(in_flight[0], rng)
        began = time.perf_counter()
        scheduler.update_from_output(in_flight.popleft(), output)
        if number >= 64:
            scheduled.append(duration)
            updated.append(time.perf_counter() - began)
    return scheduled, updated


if __name__ == "__main__":
    main()
