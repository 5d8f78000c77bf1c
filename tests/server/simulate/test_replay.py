"""The same policy on the same trace plans the same in the server, in a replay and in the simulator, step for step."""

from __future__ import annotations

import dataclasses

import pytest

from quire import LLM, SamplingParams
from quire.core.engine.engine_core import EngineCore
from quire.core.messages import EngineCoreRequest
from quire.core.plugin.builtin import quire_register_policy
from quire.core.plugin.options import parse_options
from quire.core.plugin.registry import Registrar
from quire.core.plugin.target import load_target
from quire.core.scheduling_params import SchedulingParams
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.traces.records import AbortRecord, DoneRecord, EndRecord, PolicyRecord, StepRecord
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.simulate.replay import PlanDifference, replay_recording
from quire.server.simulate.simulation import run_simulation
from quire.server.traces.recording import read_recording

CONTRACT = "quire.core.contracts.policy:BatchingPolicy"


def bundled_policies():
    registrar = Registrar("policy")
    quire_register_policy(registrar)
    return {each.name: each.target for each in registrar.registrations}


def make_policy(target):
    cls = load_target(target, CONTRACT)
    return cls(parse_options(cls, {}))


def replay(recording, policy, **options):
    return list(replay_recording(recording, policy, FCFSPolicy(), PagedAllocator, **options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama"
    make_tiny_model("llama", path)
    return str(path)


def serve(tiny, path, policy, switch_to=None, **settings):
    """Record an engine under a load that leaves out nothing: shared prefixes, n > 1, preemption, aborts, stop tokens,
    deadlines, groups, chunks, a queue, and arrivals between steps; and, half-way, a switch to another policy."""
    llm = LLM(
        model=tiny, device="cpu", max_model_len=256, scheduling_policy=policy, record=str(path), seed=1,
        **{"max_num_seqs": 6, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 18, **settings},
    )  # fmt: skip
    core = llm.engine_core
    shared = [(7 * i) % 250 + 4 for i in range(40)]
    for number in range(24):
        prompt = [*shared[: 16 * (number % 3)], *((number * 31 + j) % 250 + 4 for j in range(3 + number * 5 % 40))]
        params = SamplingParams(
            max_tokens=4 + number * 7 % 90, temperature=1.0, seed=number, ignore_eos=True,
            stop_token_ids=list(range(4, 8)),
        )  # fmt: skip
        scheduling = SchedulingParams(
            group="ab"[number % 2], deadline_ms=1e7, predicted_tokens=1 + number % 9, ttft_target_ms=500
        )
        for parent in (None, number) if number % 6 == 5 else (None,):
            add_request(core, number, prompt, params, scheduling, parent)
        if number == 12 and switch_to is not None:
            target = bundled_policies()[switch_to]
            llm.call_control("set_policy", {"name": switch_to, "target": target, "options": {}})
        for _ in range(number % 3):
            core.step()
        if number % 8 == 7:
            core.abort_requests([number - 2])
    while core.has_work:
        core.step()
    num_preemptions = core.make_stats()["num_preemptions_total"]
    llm.shutdown()
    return read_recording(path), num_preemptions


def add_request(core: EngineCore, number, prompt, params, scheduling, parent):
    number = number if parent is None else 100 + number
    core.add_request(
        EngineCoreRequest(
            number, prompt, params, 1000 * number, [2], number % 4 - 1, None, parent, f"r{number}", scheduling
        )
    )


@pytest.mark.parametrize("name", bundled_policies())
def test_a_replay_plans_what_the_server_planned(tiny, tmp_path, name):
    recording, num_preemptions = serve(tiny, tmp_path / "t", name)
    steps = [record.step for record in recording.records if isinstance(record, StepRecord) and record.step >= 0]
    outcomes = replay(recording, make_policy(bundled_policies()[name]))
    assert outcomes == steps and len(steps) > 60
    assert num_preemptions > 0
    reasons = {record.reason for record in recording.records if isinstance(record, EndRecord)}
    assert reasons >= {"stop", "length", "abort"} and any(isinstance(r, AbortRecord) for r in recording.records)


def test_a_replay_switches_the_policy_where_the_server_did(tiny, tmp_path):
    recording, _ = serve(tiny, tmp_path / "t", "sjf", switch_to="fair_share")
    steps = [record.step for record in recording.records if isinstance(record, StepRecord) and record.step >= 0]
    assert replay(recording, make_policy(bundled_policies()["sjf"])) == steps
    assert [record.name for record in recording.records if isinstance(record, PolicyRecord)] == ["fair_share"]
    # A policy that is asked for takes the place of all that were recorded: it plans beyond the switch as well.
    switch = next(i for i, record in enumerate(recording.records) if isinstance(record, PolicyRecord))
    first = next(r.step for r in recording.records[switch:] if isinstance(r, StepRecord) and r.step >= 0)
    *equal, difference = replay(recording, make_policy(bundled_policies()["sjf"]), follow_switches=False)
    assert isinstance(difference, PlanDifference) and difference.step >= first and len(equal) >= first


def test_a_replay_with_drafts_is_given_the_recorded_step_times(tiny, tmp_path):
    """The number of drafts is chosen by what steps took: without the recorded times it would differ."""
    settings = {"speculative_model": tiny, "num_speculative_tokens": 3, "num_gpu_blocks_override": 80}
    recording, _ = serve(tiny, tmp_path / "t", "fcfs", **settings)
    steps = [record.step for record in recording.records if isinstance(record, StepRecord) and record.step >= 0]
    assert any(record.drafts for record in recording.records if isinstance(record, StepRecord))
    assert replay(recording, FCFSPolicy()) == steps
    done = [record for record in recording.records if isinstance(record, DoneRecord)]
    assert len({record.device_us for record in done}) > 5


@pytest.mark.parametrize("name", bundled_policies())
def test_a_replay_plans_what_the_simulator_planned(make_setup, make_trace, tmp_path, name):
    cls = load_target(bundled_policies()[name], CONTRACT)
    trace = make_trace(count=150, rate=20.0, turns=True)
    requests = [
        dataclasses.replace(
            request, priority=i % 3, scheduling={"group": "ab"[i % 2], "deadline_ms": 1e6, "predicted_tokens": 50}
        )
        for i, request in enumerate(trace.requests)
    ]
    trace = dataclasses.replace(trace, requests=requests)
    result = run_simulation(
        trace, make_setup(lambda: make_policy(bundled_policies()[name]), max_num_seqs=8), record_to=tmp_path / "t"
    )
    recording = read_recording(tmp_path / "t")
    outcomes = replay(recording, cls(parse_options(cls, {})))
    assert len(outcomes) == result.num_steps and not any(isinstance(each, PlanDifference) for each in outcomes)
    assert result.times.is_served.all()


def test_the_simulator_repeats_its_own_recording(make_setup, make_trace, tmp_path):
    """A recording read as a trace, and simulated with the same step times, gives the same requests the same times."""
    trace = make_trace(count=100, rate=6.0, turns=True, limits=True)
    first = run_simulation(trace, make_setup(), record_to=tmp_path / "t")
    again = run_simulation(read_recording(tmp_path / "t").make_trace(), make_setup())
    assert again.times.e2e_s.tolist() == first.times.e2e_s.tolist()
    assert again.times.num_cached.tolist() == first.times.num_cached.tolist()


class NewestFirst(FCFSPolicy):
    def admission_key(self, request):
        return (-request.arrival_ns,)


class ReadsAnotherClock(FCFSPolicy):
    """Its rank depends on a clock that no recording has."""

    num_calls = 0

    def admission_key(self, request):
        type(self).num_calls += 1
        return (-self.num_calls,)


@pytest.mark.parametrize("policy", [NewestFirst, ReadsAnotherClock])
def test_another_policy_is_told_by_its_first_other_plan(tiny, tmp_path, policy):
    recording, _ = serve(tiny, tmp_path / "t", "fcfs")
    *equal, difference = replay(recording, policy())
    assert isinstance(difference, PlanDifference) and equal == list(range(len(equal)))
    assert f"step {difference.step}: recorded {{" in str(difference) and difference.recorded != difference.replayed


def test_a_policy_that_was_too_slow_in_the_server_is_replaced_in_the_replay_too(tiny, tmp_path, monkeypatch):
    """The guard is given the recorded times: the replay is quick, and yet the policy is replaced where it was."""
    (tmp_path / "slow_policy.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    recording, _ = serve(tiny, tmp_path / "t", "slow_policy:Slow")
    slow = load_target("slow_policy:Slow", CONTRACT)
    slow.seconds = 0.0
    steps = [record.step for record in recording.records if isinstance(record, StepRecord) and record.step >= 0]
    assert replay(recording, slow()) == steps


SLOW = '''
import time
from quire.plugins.sched.fcfs import FCFSPolicy

class Slow(FCFSPolicy):
    """The newest first; too slow from its tenth request on."""

    seconds = 0.06

    def __init__(self, options=None):
        super().__init__(options)
        self.num_calls = 0

    def admission_key(self, request):
        self.num_calls += 1
        if self.num_calls > 10:
            time.sleep(self.seconds)
        return (-request.arrival_ns,)
'''
