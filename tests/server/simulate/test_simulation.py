"""The simulator: deterministic, equal with and without skipped steps, and right where theory says what is right."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import numpy as np
import pytest

from quire.core.contracts.policy import BatchingPolicy
from quire.core.plugin.builtin import quire_register_policy
from quire.core.plugin.registry import Registrar
from quire.core.plugin.target import load_target
from quire.plugins.router.least_loaded import LeastLoadedRouter
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.sched.priority import PriorityPolicy
from quire.plugins.sched.sjf import SJFPolicy
from quire.server.simulate.capacity import describe_load, measure_load, scale_to_load
from quire.server.simulate.replica import Replica
from quire.server.simulate.results import Objectives
from quire.server.simulate.routing import make_assignment
from quire.server.simulate.simulation import run_simulation
from quire.server.simulate.step_model import StepShape
from quire.server.traces.trace import Trace, TraceRequest

CONTRACT = "quire.core.contracts.policy:BatchingPolicy"


def figures(result):
    """All that a result says of the simulated engine: columns of every request, and the summary."""
    columns = {name: getattr(result.times, name) for name in result.times.__dataclass_fields__}
    return {**{name: list(column) for name, column in columns.items()}, **result.summarize()}


def assert_same(first, second):
    for name, value in figures(first).items():
        assert np.array_equal(
            np.array(value), np.array(figures(second)[name]), equal_nan=not isinstance(value, str | dict | list)
        ) or str(value) == str(figures(second)[name]), name


TRACES = {
    "light": {"rate": 1.0},
    "long answers": {"rate": 0.5, "output": "exponential/600", "count": 60},
    "busy": {"rate": 30.0},
    "limits": {"rate": 6.0, "limits": True},
    "conversations": {"rate": 6.0, "turns": True, "count": 200},
    "prefixes": {"rate": 6.0, "prefixes": 3, "prefix_len": 256},
}


OTHERS = [("busy", PriorityPolicy), ("busy", SJFPolicy), ("limits", SJFPolicy), ("prefixes", PriorityPolicy)]


@pytest.mark.parametrize(("name", "policy"), [*((name, FCFSPolicy) for name in TRACES), *OTHERS])
def test_skipped_steps_change_no_digit(make_setup, make_trace, name, policy):
    trace = make_trace(**TRACES[name])
    whole = run_simulation(trace, make_setup(policy, skip=False))
    skipped = run_simulation(trace, make_setup(policy))
    assert_same(whole, skipped)
    assert whole.num_skipped_steps == 0 and skipped.num_steps == whole.num_steps
    assert skipped.num_skipped_steps > whole.num_steps * {"busy": 0.1, "long answers": 0.9}.get(name, 0.3)


@pytest.mark.parametrize("limits", [{"num_blocks": 300}, {"max_num_seqs": 4}, {"max_num_batched_tokens": 128}])
@pytest.mark.parametrize("name", ["busy", "conversations"])
def test_skipped_steps_change_no_digit_where_rows_blocks_or_tokens_are_scarce(make_setup, make_trace, name, limits):
    trace = make_trace(**TRACES[name])
    if "num_blocks" in limits:
        trace = trace.scale_lengths(0.5)
    whole, skipped = (run_simulation(trace, make_setup(skip=skip, **limits)) for skip in (False, True))
    assert_same(whole, skipped)


def test_skipped_steps_change_no_digit_where_decodes_are_padded(make_setup, make_trace, padded_model):
    host = msgspec.structs.replace(padded_model.host, launch_us=6000.0)  # as long as a step
    for model in (padded_model, msgspec.structs.replace(padded_model, host=host)):
        trace = make_trace(rate=6.0)
        assert_same(*(run_simulation(trace, make_setup(model=model, skip=skip)) for skip in (False, True)))


class _Recording(LeastLoadedRouter):
    """Keeps what it is told; the share of blocks in use decides often, since requests are spread evenly."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def choose_replica(self, request, replicas):
        self.seen.append(list(replicas))
        return super().choose_replica(request, replicas)


@pytest.mark.parametrize("name", ["light", "long answers", "busy", "conversations"])
def test_skipped_steps_change_no_digit_and_no_load_among_replicas(make_setup, make_trace, name):
    trace = make_trace(**TRACES[name])
    results, routers = [], [_Recording(), _Recording()]
    for skip, router in zip((False, True), routers, strict=True):
        assign = make_assignment(router, trace)
        results.append(run_simulation(trace, make_setup(skip=skip), num_replicas=3, assign=assign))
    assert_same(*results)
    assert routers[0].seen == routers[1].seen
    assert len({load.kv_usage for loads in routers[0].seen for load in loads}) > 20


def test_every_request_is_served_once_and_whole(make_setup, make_trace):
    trace = make_trace(rate=20.0, limits=True)
    result = run_simulation(trace, make_setup())
    assert result.times.is_served.all()
    assert result.times.output_len.tolist() == [request.output_len for request in trace.requests]
    assert (result.times.ttft_s > 0).all() and (result.times.e2e_s >= result.times.ttft_s).all()


def test_preemption_loses_no_token(make_setup, make_trace):
    trace = make_trace(count=60, rate=50.0, output="fixed/200").scale_lengths(0.5)
    result = run_simulation(trace, make_setup(num_blocks=120, max_model_len=1024))
    assert result.times.num_preemptions.sum() > 0 and result.times.is_served.all()
    assert result.times.output_len.tolist() == [request.output_len for request in trace.requests]


def test_a_conversation_finds_what_was_said_in_the_cache(make_setup, make_trace):
    trace = make_trace(**TRACES["conversations"])
    result = run_simulation(trace, make_setup())
    expected = 0
    for number, request in enumerate(trace.requests):
        before = trace.requests[number - 10] if number >= 10 else None
        if before is not None and request.block_hashes[:1] == before.block_hashes[:1]:
            # All but the last token of the answer before has its keys and values in the cache.
            expected += (before.prompt_len + before.output_len - 1) // 16 * 16
    assert 0.8 * expected <= result.times.num_cached.sum() <= expected
    cold = run_simulation(trace, make_setup(prefix_caching=False))
    assert cold.times.num_cached.sum() == 0 and cold.times.ttft_s.mean() > result.times.ttft_s.mean()


def test_one_request_takes_what_its_steps_take(make_setup, model):
    """Two chunks of a prompt, then decodes: the clock is the sum."""
    host = model.host
    result = run_simulation(Trace("one", [TraceRequest(0.0, 3000, 5)]), make_setup())
    schedule, launch, update = (sum(model.host_ns(1)[:k]) - sum(model.host_ns(1)[: k - 1]) for k in (1, 2, 3))
    device = [
        model.device_ns(StepShape(1, 2048, 0, 2048 * 2049 // 2, 0)),
        model.device_ns(StepShape(1, 952, 0, 952 * 3000 - 952 * 951 // 2, 0)),
        *(model.device_ns(StepShape(1, 1, 3000 + i, 0, 1)) for i in (1, 2, 3, 4)),
    ]
    gap, first = round(host.gap_us * 1e3), round(host.arrival_us * 1e3) + schedule + launch
    out = round(host.output_us * 1e3)
    assert round(result.times.ttft_s[0] * 1e9) == first + sum(device[:2]) + 2 * gap + out
    # Steps are longer than the host's work, so that it hides behind them.
    assert min(device) > schedule + launch + update
    assert round(result.times.e2e_s[0] * 1e9) == first + sum(device) + len(device) * gap + out


@pytest.mark.parametrize("hash_block_size", [0, 16])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_the_continuations_of_one_prompt_compute_it_once(make_setup, hash_block_size, num_replicas):
    requests = [TraceRequest(0.001 * i, 1003, 9 + i, prompt_id=i // 3) for i in range(6)]
    results = []
    for each in (requests, [dataclasses.replace(request, prompt_id=None) for request in requests]):
        trace, prompt_tokens = Trace("n", each, hash_block_size), []

        def observe(now_ns, step, device_ns, prompt_tokens=prompt_tokens):
            prompt_tokens.append(int(step.num_scheduled_tokens[step.num_decodes :].sum()))

        def assign(number, message, request, replicas):
            return number % len(replicas)

        result = run_simulation(trace, make_setup(), num_replicas=num_replicas, assign=assign, observe_step=observe)
        assert result.times.output_len.tolist() == [request.output_len for request in requests]
        results.append(sum(prompt_tokens))
    assert 2 * 1003 <= results[0] <= 2 * 1003 + 4 * 2 and results[1] == 6 * 1003


def test_the_mean_wait_is_that_of_pollaczek_and_khinchine(make_setup, model):
    """One server, first come first served, Poisson arrivals: ``E[W] = rate E[S^2] / (2 (1 - rho))`` (M/G/1).
    Requests of one prompt token, one row, steps of 10 ms and no host."""
    flat = msgspec.structs.replace(
        model, tokens_us=(10_000.0,) * 4, context_us=0.0, pair_us=0.0, prompt_step_us=0.0,
        host=type(model.host)(0, 0, 0, 0, 0, 0, 0, 0, 0),
    )  # fmt: skip
    rng = np.random.default_rng(7)
    answers = np.maximum(rng.exponential(20, 8_000).astype(int), 1)
    arrivals = rng.exponential(0.32, 8_000).cumsum()
    requests = [TraceRequest(float(t), 1, int(n)) for t, n in zip(arrivals, answers, strict=True)]
    result = run_simulation(Trace("mg1", requests), make_setup(model=flat, max_num_seqs=1))
    # Two steps are in flight: a request's row is free one step after its last token is sampled.
    service = (answers + 1) * 0.01
    rho = service.mean() / 0.32
    assert 0.6 < rho < 0.75
    wait = result.times.ttft_s - 0.01
    expected = (service**2).mean() / 0.32 / (2 * (1 - rho))
    assert wait.mean() == pytest.approx(expected, rel=0.1)


def test_the_load_is_told_and_warned_of_beyond_what_can_be_trusted(make_setup, make_trace):
    setup, trace = make_setup(max_model_len=16384), make_trace(count=400, rate=1.0)
    for wanted in (0.5, 0.9):
        scaled = scale_to_load(trace, setup, wanted, 1)
        load = measure_load(scaled, setup, 1)
        assert load["mean"] == pytest.approx(wanted, rel=0.01)
        assert "do not trust" not in describe_load({**load, "peak": load["mean"]})
    below, above = (run_simulation(scale_to_load(trace, setup, load, 1), setup) for load in (0.5, 2.0))
    assert above.times.ttft_s.mean() > 3 * below.times.ttft_s.mean()
    warned = describe_load(measure_load(scale_to_load(trace, setup, 1.2, 1), setup, 1))
    assert "do not trust these latencies" in warned
    doubled = measure_load(scale_to_load(trace, setup, 0.5, 2), setup, 2)
    assert doubled["mean"] == pytest.approx(0.5, rel=0.01)


def bundled_policies():
    registrar = Registrar("policy")
    quire_register_policy(registrar)
    return [load_target(each.target, CONTRACT) for each in registrar.registrations]


@pytest.mark.parametrize("policy", bundled_policies(), ids=lambda policy: policy.__name__)
def test_skipped_steps_change_no_digit_with_any_bundled_policy(make_setup, make_trace, policy):
    trace = make_trace(rate=4.0, turns=True, count=60)
    requests = [
        dataclasses.replace(request, scheduling={"group": "ab"[i % 2], "deadline_ms": 3000.0, "predicted_tokens": 40})
        for i, request in enumerate(trace.requests)
    ]
    trace = dataclasses.replace(trace, requests=requests)
    assert_same(*(run_simulation(trace, make_setup(policy, skip=skip, max_num_seqs=8)) for skip in (False, True)))


class Counts(FCFSPolicy):
    """Grants as the default does, and looks at each step: its promise would be a lie."""

    def __init__(self, options=None):
        super().__init__(options)
        self.num_calls = 0

    def schedule(self, view):
        self.num_calls += 1
        return super().schedule(view)


class Promises(Counts):
    changes_only_at_events = True


def test_steps_are_skipped_only_where_the_policy_promises(make_setup, make_trace):
    trace = make_trace(rate=1.0)
    silent, promised = run_simulation(trace, make_setup(Counts)), run_simulation(trace, make_setup(Promises))
    assert silent.num_skipped_steps == 0 < promised.num_skipped_steps
    assert_same(silent, promised)


class Fails(BatchingPolicy):
    def admission_key(self, request):
        return (request.arrival_ns,)

    def schedule(self, view):
        if view.now_ns > 5e9:
            raise ValueError("tired")
        return super().schedule(view)


def test_a_policy_that_fails_is_replaced_and_the_result_says_so(make_setup, make_trace):
    result = run_simulation(make_trace(rate=5.0), make_setup(Fails))
    assert result.times.is_served.all()
    assert len(result.quarantined) == 1 and "raised" in result.quarantined[0]


def test_objectives_count_requests(make_setup, make_trace):
    result = run_simulation(make_trace(rate=5.0), make_setup())
    ttft, tpot = np.median(result.times.ttft_s) * 1e3, float("inf")
    assert Objectives(ttft, None).check_requests(result.times).mean() == pytest.approx(0.5, abs=0.01)
    assert result.summarize(Objectives(1e9, tpot))["slo_attainment"] == 1.0


def test_requests_that_can_never_run_are_not_served(make_setup):
    trace = Trace("one", [TraceRequest(0.0, 100, 5), TraceRequest(0.1, 5000, 5)])
    result = run_simulation(trace, make_setup())
    assert result.times.is_served.tolist() == [True, False] and math.isnan(result.times.e2e_s[1])


def test_a_synchronous_engine_waits_for_each_step(make_setup, make_trace):
    trace = make_trace(rate=2.0)
    both = [run_simulation(trace, make_setup(max_in_flight_steps=n)).times.tpot_s for n in (1, 2)]
    assert np.nanmean(both[0]) > 1.01 * np.nanmean(both[1])


def test_the_engine_observes_every_step_it_is_asked_to(make_setup, make_trace):
    seen = []
    result = run_simulation(
        make_trace(count=20, rate=2.0), make_setup(), observe_step=lambda now, step, ns: seen.append(now)
    )
    assert len(seen) == result.num_steps and seen == sorted(seen) and isinstance(Replica, type)
