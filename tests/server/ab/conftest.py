"""Switchbacks on small simulated servers, with arms whose steps take more or less time."""

from __future__ import annotations

import pytest

from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.ab.analysis import analyze_pairs
from quire.server.ab.observations import combine_arms
from quire.server.ab.simulated import plan_blocks, repeat_arrivals, run_switchback_simulation
from quire.server.simulate.results import Objectives
from quire.server.simulate.simulation import EngineSetup
from quire.server.simulate.step_model import load_step_model
from quire.server.traces.synthetic import make_arrivals, make_synthetic_trace

BLOCK_S, RATE = 4.0, 12.0


@pytest.fixture(scope="session")
def switchback():
    """The verdict of a switchback whose arm B has steps ``slowdown`` times as long. ``repeats``: both stretches of a
    pair have the same arrivals, as in a live one."""

    def run(seed, pairs=12, slowdown=1.0, repeats=False):
        count = int(2 * pairs * BLOCK_S * RATE * 1.2) + 50
        spec = f"synthetic:requests={count},input=lognormal/300/0.8,output=lognormal/30/0.6"
        trace = make_synthetic_trace(spec, seed)
        trace = trace.replace_arrivals(make_arrivals(f"poisson:rate={RATE}", count, seed))
        model = load_step_model(None)
        slow = model.scale_device_times(slowdown)
        setups = [EngineSetup(m, m.limits, FCFSPolicy, FCFSPolicy, PagedAllocator, "fcfs") for m in (model, slow)]
        blocks = plan_blocks(pairs, BLOCK_S, seed)
        trace = repeat_arrivals(trace, blocks) if repeats else trace
        measured = run_switchback_simulation(trace, setups, blocks, 0.5)
        return analyze_pairs(combine_arms(measured), Objectives(), 2 * BLOCK_S, seed)

    return run
