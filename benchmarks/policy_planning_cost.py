"""Host time that planning takes in a step, for each bundled policy: the view, the policy, the check of its plan.

    PYTHONPATH=src python benchmarks/policy_planning_cost.py

In ``decode`` all rows are taken; in ``churn`` one request ends and one is admitted in a step, on average, so that the
policy looks at the head of the queue. Requests come from 64 groups, have deadlines, and share prefixes. Figures are of
the time that the thread ran: other work on the machine tells less. The loop printed first tells how fast the machine is
now. In ``churn`` two steps in five find no row free: a policy that is asked while one is has two kinds of steps,
``p10`` is of the cheap kind, and the median may be of either. ``mean`` is what planning takes of the host's time.
"""

from __future__ import annotations

import argparse
import gc
import timeit

import numpy as np

from quire.core.contracts.policy import BatchingPolicy
from quire.core.plugin.builtin import quire_register_policy
from quire.core.plugin.registry import Registrar
from quire.core.plugin.target import load_target
from quire.plugins.kv.paged import PagedAllocator
from quire.server.plugin_bench.host_benches import CallTimer, HostLoad, PolicyBench, SchedulerRun


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
    print(f"{'policy':16} {'waiting':>8} {'':8} {'median':>9} {'p10':>9} {'p90':>9} {'mean':>9}   us a step")
    for registration in registrar.registrations:
        if args.policies and registration.name not in args.policies:
            continue
        for churn in (False, True):
            for waiting in args.waiting:
                policy = load_target(registration.target)()
                durations = np.array(measure(policy, args.running, waiting, args.steps, churn)) * 1e6
                figures = (*np.percentile(durations, (50, 10, 90)), durations.mean())
                state = "churn" if churn else "decode"
                columns = " ".join(f"{figure:9.1f}" for figure in figures)
                print(f"{registration.name:16} {waiting:>8} {state:8} {columns}", flush=True)


def measure(policy: BatchingPolicy, running: int, waiting: int, steps: int, churn: bool) -> list[float]:
    """Seconds of each step."""
    run = SchedulerRun(policy, PagedAllocator, HostLoad(running, waiting, churn, steps))
    timed = CallTimer(run.scheduler.policy_runner, PolicyBench.METHODS)
    gc.collect()
    gc.freeze()
    durations = []
    for number in range(steps + 64):
        timed.seconds = 0.0
        run.run_step()
        if number >= 64:
            durations.append(timed.seconds)
    assert run.scheduler.stats()["plugin_quarantines_total"] == 0
    gc.unfreeze()
    return durations


if __name__ == "__main__":
    main()
