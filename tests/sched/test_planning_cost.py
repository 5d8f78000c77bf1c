"""Planning stays cheap, whatever the policy and however long the queue. Limits are generous: CI machines are slow and
shared. ``benchmarks/policy_planning_cost.py`` has the figures."""

import time

import numpy as np
import pytest

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.messages import EngineCoreRequest, ModelRunnerOutput
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.core.scheduling_params import SchedulingParams
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy

from .test_conformance import BUNDLED


def median_step_ms(policy, waiting, running=256, steps=40):
    """Time of the thread that ``schedule`` takes while one request ends and one is admitted in each step."""
    allocator = PagedAllocator([KVGroup()], 1 + 300 * 32, 16)
    scheduler = Scheduler(
        SchedulerConfig(running, 8192),
        CacheConfig(16, allocator.num_blocks),
        allocator,
        policy,
        fallback=FCFSPolicy(),
        max_model_len=512,
    )
    for i in range(running + waiting):
        said = SchedulingParams(group=f"g{i % 64}", deadline_ms=1e8)
        params = SamplingParams(max_tokens=400, seed=i)
        prompt = [i % 20] * 16 + [i % 1000] * 8
        scheduler.add_request(EngineCoreRequest(i, prompt, params, i, [], 0, None, None, "", said))
    seconds = []
    for number in range(steps):
        rows = scheduler.debug_state().running.rows
        if number >= 8:
            scheduler.abort_request(int(scheduler.debug_state().running.request_ids[rows[0]]))
        began = time.thread_time()
        step = scheduler.schedule()
        seconds.append(time.thread_time() - began)
        tokens = np.zeros((len(step.rows), 1), np.int32)
        scheduler.update_from_output(step, ModelRunnerOutput(step.step, tokens, step.sampling_mask.astype(np.int32)))
    assert scheduler.stats()["plugin_quarantines_total"] == 0
    return 1e3 * float(np.median(seconds[10:]))


@pytest.mark.parametrize("cls", BUNDLED.values(), ids=BUNDLED)
def test_a_step_is_planned_in_a_fraction_of_a_millisecond(cls):
    assert median_step_ms(cls(), waiting=2_000) < 2.0


@pytest.mark.parametrize("name", ["fcfs", "fair_share"])
def test_a_long_queue_does_not_slow_a_step(name):
    short = median_step_ms(BUNDLED[name](), waiting=1_000)
    long = median_step_ms(BUNDLED[name](), waiting=20_000)
    assert long < 3 * short + 0.2
