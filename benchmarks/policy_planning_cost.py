"""Host time that planning takes in a step, for each bundled policy: the view, the policy, the check of its plan.

    PYTHONPATH=src python benchmarks/policy_planning_cost.py

In ``decode`` all rows are taken; in ``churn`` one request ends and one is admitted in every step, so that the policy
looks at the head of the queue. Requests come from 64 groups, have deadlines, and share prefixes. Figures are
medians and ``p10``, of the time that the thread ran: other work on the machine tells less. The loop printed first tells
how fast the machine is now.
"""

from __future__ import annotations

import argparse
import gc
import time
import timeit
from collections import deque

import numpy as np
from scheduler_host_cost import make_output

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.contracts.policy import BatchingPolicy
from quire.core.messages import EngineCoreRequest, SchedulerOutput
from quire.core.plugin.builtin import quire_register_policy
from quire.core.plugin.registry import Registrar
from quire.core.plugin.target import load_target
from quire.core.sampling_params import SamplingParams
from quire.core.sched.policy_runner import PolicyRunner
from quire.core.sched.scheduler import Scheduler
from quire.core.scheduling_params import SchedulingParams
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy

BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, nargs="*", default=[0, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--policies", nargs="*", help="names; default: all bundled ones")
    args = parser.parse_args()
    registrar = Registrar("policy")
    quire_register_policy(registrar)
    loop = min(timeit.repeat("for x in range(256): pass", number=1000, repeat=20)) * 1e3
    print(f"a Python loop over 256 numbers: {loop:.1f} us")
    print(f"{'policy':16} {'waiting':>8} {'':8} {'median':>9} {'p10':>9}   us a step")
    for registration in registrar.registrations:
        if args.policies and registration.name not in args.policies:
            continue
        for churn in (False, True):
            for waiting in args.waiting:
                policy = load_target(registration.target)()
                median, low = np.percentile(measure(policy, args.running, waiting, args.steps, churn), (50, 10))
                state = "churn" if churn else "decode"
                print(f"{registration.name:16} {waiting:>8} {state:8} {1e6 * median:9.1f} {1e6 * low:9.1f}", flush=True)


class TimedRunner:
    """Times what a ``PolicyRunner`` does for a step."""

    def __init__(self, runner: PolicyRunner) -> None:
        self.seconds = 0.0
        for name in ("make_plan", "step_scheduled", "step_finished"):
            setattr(runner, name, self._time(getattr(runner, name)))

    def _time(self, function):
        def timed(*args):
            began = time.thread_time()
            result = function(*args)
            self.seconds += time.thread_time() - began
            return result

        return timed


def measure(policy: BatchingPolicy, running: int, waiting: int, steps: int, churn: bool) -> list[float]:
    """Seconds of each step."""
    rng = np.random.default_rng(0)
    blocks = 1 + (running + 8) * 2048 // BLOCK
    allocator = PagedAllocator([KVGroup()], blocks, BLOCK)
    scheduler = Scheduler(
        SchedulerConfig(running, 8192), CacheConfig(BLOCK, blocks), allocator, policy, fallback=FCFSPolicy(),
        max_model_len=2048,
    )  # fmt: skip
    prefixes = [rng.integers(0, 1000, 4 * BLOCK).tolist() for _ in range(20)]
    start = time.monotonic_ns()
    for i in range(running + waiting + (steps + 100 if churn else 0)):
        prompt = [*prefixes[i % 20], *rng.integers(0, 1000, 16 + i % 64).tolist()]
        # In churn the running requests end one after another, whichever they are.
        tokens = 1900 if not churn else int(rng.integers(1, 2 * running)) if waiting else 1 + min(i, running)
        params = SamplingParams(max_tokens=tokens, seed=i)
        said = SchedulingParams(group=f"g{i % 64}", deadline_ms=1e8, predicted_tokens=tokens)
        scheduler.add_request(EngineCoreRequest(i, prompt, params, start + i, [1000], 0, None, None, "", said))
    timed = TimedRunner(scheduler.policy_runner)
    gc.collect()
    gc.freeze()
    in_flight: deque[SchedulerOutput] = deque()
    durations = []
    for number in range(steps + 64):
        timed.seconds = 0.0
        step = scheduler.schedule()
        assert step is not None
        in_flight.append(step)
        if len(in_flight) == 2:
            output = make_output(in_flight[0], rng)
            output.device_us = 10_000.0
            scheduler.update_from_output(in_flight.popleft(), output)
        if number >= 64:
            durations.append(timed.seconds)
    assert scheduler.stats()["plugin_quarantines_total"] == 0
    gc.unfreeze()
    return durations


if __name__ == "__main__":
    main()
