"""Policies that only order the queue, and what groups are known to have used."""

import random

import numpy as np
import pytest

from quire.core.config import SpeculationConfig
from quire.core.contracts.policy import BatchingPolicy, make_default_plan
from quire.core.scheduling_params import SchedulingParams
from quire.plugins.sched.fcfs import FCFSPolicy


class LongestFirst(BatchingPolicy):
    """The longest prompt of those that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []  # requests in each view

    def admission_key(self, request):
        return (request.arrival_ns,)

    def order_waiting(self, view):
        self.seen.append(len(view.waiting))
        return (-view.waiting.prompt_len).argsort(kind="stable")


class LongestFirstByPlan(LongestFirst):
    def schedule(self, view):
        return make_default_plan(view, waiting_order=self.order_waiting(view))


def serve(engine, lengths):
    for i, length in enumerate(lengths):
        engine.add_request(f"r{i}", [i] * length, max_tokens=3)
    steps = []
    while engine.scheduler.has_unfinished_requests or engine.in_flight:
        step = engine.launch_step()
        if step is not None:
            steps.append((step.rows.tolist(), step.num_scheduled_tokens.tolist()))
        if engine.in_flight:
            engine.finish_step()
    assert set(engine.finished.values()) == {"length"}
    return steps


def test_the_engine_plans_in_that_order(make_engine):
    lengths = [2, 30, 5, 12, 7, 25]
    steps = serve(make_engine(policy := LongestFirst(), rows=2), lengths)
    assert steps[0][1] == [30]
    assert steps == serve(make_engine(LongestFirstByPlan(), rows=2), lengths)
    assert policy.seen


def test_no_order_is_that_of_the_keys(make_engine):
    class Undecided(LongestFirst):
        def order_waiting(self, view):
            return None

    assert serve(make_engine(Undecided(), rows=1), [2, 9, 4]) == serve(make_engine(None, rows=1), [2, 9, 4])


def test_an_empty_order_admits_nobody(make_engine):
    """Also as ``np.array([])``, whose numbers are floats."""

    class Late(LongestFirst):
        def order_waiting(self, view):
            return np.array([i for i in range(len(view.waiting)) if len(view.running) == 0])

    engine = make_engine(Late(), rows=2)
    serve(engine, [2, 9, 4])
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_a_policy_is_asked_while_it_can_choose_and_after_an_arrival(make_engine):
    engine = make_engine(policy := LongestFirst(), rows=1)
    engine.add_request("r0", [1], max_tokens=9)
    for _ in range(3):
        engine.run_step()
    assert policy.seen == [1]
    engine.add_request("r1", [1], max_tokens=1)
    for _ in range(3):
        engine.run_step()
    assert policy.seen == [1, 0], "no row is free"
    engine.run_until_finished()
    assert policy.seen == [1, 0, 1]


@pytest.mark.parametrize(
    "order", [[0, 0], [-1], [7], [0.0], [[0]], "first", np.ma.masked_array([0, 1], [True, False])], ids=repr
)
def test_a_policy_whose_order_is_none_is_quarantined(make_engine, order):
    class Disorderly(LongestFirst):
        def order_waiting(self, view):
            return order if isinstance(order, str | np.ndarray) else np.array(order)

    engine = make_engine(Disorderly())
    serve(engine, [3, 2])
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 1
    assert [plugin.reason for plugin in engine.scheduler.quarantined] == ["invalid_result"]


def test_what_is_written_into_the_view_changes_no_plan(make_engine):
    class Writing(LongestFirst):
        def order_waiting(self, view):
            for columns in (view.running, view.waiting):
                columns.num_remaining_tokens.flags.writeable = True
                columns.num_remaining_tokens[:] = 1
            view.num_free_rows, view.token_budget = 100, 0
            return super().order_waiting(view)

    lengths = [9, 20, 3, 40]
    assert serve(make_engine(Writing(), rows=2), lengths) == serve(make_engine(LongestFirst(), rows=2), lengths)


class Accountant(BatchingPolicy):
    """Adds up what reports say of each group, and compares."""

    def __init__(self):
        super().__init__()
        self.group_of, self.used, self.num_compared = {}, {}, 0
        self.prompt_tokens = {}  # by group, when it looked last

    def admission_key(self, request):
        return (request.arrival_ns,)

    def group_key(self, request):
        self.group_of[request.request_number] = request.group
        return request.group

    def schedule(self, view):
        groups = view.groups
        if view.step % 3 == 0:  # not in every step: most policies look now and then
            totals = (groups.num_prompt_tokens + groups.num_output_tokens).tolist()
            assert dict(zip(groups.keys, totals, strict=True)) == {key: self.used.get(key, 0) for key in groups.keys}
            self.num_compared += any(totals)
            for key, num_tokens in zip(groups.keys, groups.num_prompt_tokens.tolist(), strict=True):
                assert num_tokens >= self.prompt_tokens.get(key, 0)
                self.prompt_tokens[key] = num_tokens
        return make_default_plan(view)

    def step_scheduled(self, report):
        for number, tokens in zip(report.request_numbers.tolist(), report.num_scheduled_tokens.tolist(), strict=True):
            group = self.group_of[number]
            self.used[group] = self.used.get(group, 0) + tokens


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_of_groups_are_those_of_their_steps(make_engine, num_drafts, seed):
    """Whatever happens to requests: drafts are rejected, rows lost, steps fail."""
    rng = random.Random(seed)
    speculation = SpeculationConfig(num_drafts, adaptive=False) if num_drafts else None
    engine = make_engine(policy := Accountant(), num_blocks=26, watermark=0.0, speculation=speculation)
    for i in range(60):
        said = SchedulingParams(group=f"g{rng.randrange(4)}")
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        engine.add_request(f"r{i}", prompt, max_tokens=rng.randrange(1, 20), scheduling=said)
        for _ in range(rng.randrange(3)):
            chance = rng.random()
            if chance < 0.05:
                engine.launch_failing_step()
            elif chance < 0.1:
                engine.launch_step_out_of_memory()
            else:
                engine.run_step()
    engine.run_until_finished()
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0
    assert engine.scheduler.stats()["num_preemptions_total"] > 0 and policy.num_compared > 20


class CountsCalls(BatchingPolicy):
    """The default plan, and how often it was asked for."""

    def __init__(self, promises):
        super().__init__()
        self.changes_only_at_events, self.views = promises, []

    def admission_key(self, request):
        return (request.arrival_ns,)

    def schedule(self, view):
        self.views.append((view.running.num_remaining_tokens.tolist(), view.running.output_len.tolist()))
        return make_default_plan(view)


class PromisesEqualPlans(FCFSPolicy):
    """Its own promise, of its own plans."""

    changes_only_at_events = True

    def schedule(self, view):
        return make_default_plan(view)


class Heir(PromisesEqualPlans):
    """Other plans, perhaps: it has promised nothing."""

    num_asked = 0

    def schedule(self, view):
        self.num_asked += 1
        return super().schedule(view)


def test_a_policy_that_promises_equal_plans_is_not_asked_for_decodes_alone(make_engine):
    lengths = [2, 30, 5, 41, 7, 25]
    asked, spared = CountsCalls(False), CountsCalls(True)
    assert serve(make_engine(asked, rows=3, budget=20), lengths) == serve(
        make_engine(spared, rows=3, budget=20), lengths
    )
    assert 0 < len(spared.views) < len(asked.views)
    heirs = Heir()
    assert serve(make_engine(heirs, rows=3, budget=20), lengths) == serve(
        make_engine(asked, rows=3, budget=20), lengths
    )
    assert heirs.num_asked > len(spared.views), "another class's promise was taken for this one's"
    # A prompt of which one token is left is no decode: the policy may do as it likes.
    engine = make_engine(spared, rows=2, budget=20)
    spared.views.clear()
    serve(engine, [21])
    assert spared.views == [([], []), ([1], [0])]
