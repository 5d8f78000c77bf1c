"""Whether the verdicts of ``quire ab`` can be trusted: 100 switchbacks of equal arms, and 100 with a planted effect.

    PYTHONPATH=src python benchmarks/ab_calibration.py --runs 100

Each run is a switchback on a simulated server under Poisson traffic of a seed of its own. A/A: both arms are the same,
and a run is right if it finds no difference in any metric. Planted: steps take 5 % longer in arm B; a pilot of equal
arms says how long a run must be to find 5 % in the time per output token, and a run of that length is right if it finds
it.
"""

from __future__ import annotations

import argparse
import time

from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.ab.analysis import MIN_PAIRS, Verdict, analyze_pairs
from quire.server.ab.observations import combine_arms
from quire.server.ab.simulated import plan_blocks, run_switchback_simulation
from quire.server.simulate.results import Objectives
from quire.server.simulate.simulation import EngineSetup
from quire.server.simulate.step_model import StepTimeModel, load_step_model
from quire.server.traces.synthetic import make_arrivals, make_synthetic_trace

METRIC = "tpot_p50"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--block", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=12.0)
    args = parser.parse_args()
    start = time.perf_counter()
    num_right = sum(not run(seed, MIN_PAIRS, 1.0, args).significant for seed in range(args.runs))
    print(f"A/A: no difference in {num_right} of {args.runs} runs ({time.perf_counter() - start:.0f} s)", flush=True)
    num_found, lengths = 0, []
    for seed in range(args.runs):
        pairs = run(10_000 + seed, MIN_PAIRS, 1.0, args).get_effect(METRIC).recommended_pairs
        effect = run(20_000 + seed, pairs, 1.05, args).get_effect(METRIC)
        num_found += effect.is_significant and effect.effect > 0
        lengths.append(pairs)
    lengths.sort()
    print(
        f"planted 5 %: found in {num_found} of {args.runs} runs of the recommended length, {lengths[0]} to "
        f"{lengths[-1]} pairs, median {lengths[len(lengths) // 2]} ({time.perf_counter() - start:.0f} s)"
    )


def run(seed: int, pairs: int, slowdown: float, args: argparse.Namespace) -> Verdict:
    count = int(2 * pairs * args.block * args.rate * 1.15) + 50
    trace = make_synthetic_trace(f"synthetic:requests={count},input=lognormal/300/0.8,output=lognormal/30/0.6", seed)
    trace = trace.replace_arrivals(make_arrivals(f"poisson:rate={args.rate}", count, seed))
    model = load_step_model(None)
    setups = [make_setup(model), make_setup(model.scale_device_times(slowdown))]
    blocks = plan_blocks(pairs, args.block, seed)
    measured = run_switchback_simulation(trace, setups, blocks, 0.5)
    return analyze_pairs(combine_arms(measured), Objectives(), 2 * args.block, seed)


def make_setup(model: StepTimeModel) -> EngineSetup:
    return EngineSetup(model, model.limits, FCFSPolicy, FCFSPolicy, PagedAllocator, "fcfs")


if __name__ == "__main__":
    main()
