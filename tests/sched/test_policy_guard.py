"""Policies that misbehave, each in its way: the engine goes on, no request is lost, and the log names the policy."""

import time

import numpy as np
import pytest

from quire.core.contracts.policy import Grants, Reject, RequestColumns
from quire.core.errors import PluginError, QueueFullError
from quire.core.sched.default_policy_plan import make_default_plan
from quire.plugins.sched.fcfs import FCFSPolicy


def grants(rows, tokens, victims=None):
    return Grants(np.array(rows), np.array(tokens), None if victims is None else np.array(victims))


class After(FCFSPolicy):
    """Behaves for a few steps, then does ``harm``."""

    def __init__(self, harm):
        super().__init__()
        self.harm = harm
        self.calls = 0

    def schedule(self, view):
        self.calls += 1
        return self.harm(view) if self.calls > 3 else make_default_plan(view)


def raises(view):
    raise ValueError("a bug")


def exits(view):
    raise KeyError


def writes_into_the_view(view):
    view.running.num_remaining_tokens[:] = 0


def orders_by_a_mask(view):
    return make_default_plan(
        view, waiting_order=np.ma.masked_array(np.arange(len(view.waiting)), np.arange(len(view.waiting)) == 0)
    )


def tampers_with_its_plan(view):
    plan = make_default_plan(view)
    for name in type(plan).__slots__:
        setattr(plan, name, None)
    return plan


HARMS = {
    "orders by a masked array": orders_by_a_mask,
    "tampers with its plan": tampers_with_its_plan,
    "raises": raises,
    "raises without a text": exits,
    "returns None": lambda view: None,
    "returns lists": lambda view: Grants([0], [1]),
    "returns floats": lambda view: grants([0.0], [1.0]),
    "returns objects": lambda view: Grants(np.array([None]), np.array([1])),
    "returns a matrix": lambda view: grants([[0]], [[1]]),
    "names no request of the view": lambda view: grants([len(view.running) + len(view.waiting)], [1]),
    "counts from the end": lambda view: grants([-1], [1]),
    "names a request twice": lambda view: grants([0, 0], [1, 1]),
    "grants a negative number": lambda view: grants([0], [-1]),
    "has more requests than grants": lambda view: grants([0, 1], [1]),
    "names victims that do not run": lambda view: grants([0], [1], [len(view.running)]),
    "names victims by float": lambda view: grants([0], [1], [0.5]),
    "grants nothing, ever": lambda view: grants(np.empty(0, int), np.empty(0, int)),
    "grants zero, ever": lambda view: grants([0], [0]),
    "writes into the view": writes_into_the_view,
}


@pytest.mark.parametrize("budget", [-(10**30), -5, 10**30])
@pytest.mark.parametrize("is_read", [False, True])
def test_a_default_plan_within_any_budget_is_no_fault(make_engine, budget, is_read):
    def plan_within(view):
        limit = budget if policy.calls % 2 else None  # one that grants nothing, for ever, is a fault
        plan = make_default_plan(view, token_budget=limit, min_prefill_tokens=budget)
        assert not is_read or len(plan.request_indices) <= 4
        return plan

    policy = After(plan_within)
    engine = make_engine(policy)
    for i in range(4):
        engine.add_request(f"r{i}", [i] * 9, max_tokens=6)
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"}
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_policy_whose_plans_are_nonsense_is_replaced(make_engine, caplog, harm):
    engine = make_engine(After(harm), num_blocks=30, rows=4, budget=10)
    for i in range(12):
        engine.add_request(f"r{i}", [i] * (1 + 2 * i), max_tokens=12)
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"} and len(engine.finished) == 12
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 1
    (record,) = [r for r in caplog.records if r.name == "quire.plugin"]
    assert "After is quarantined" in record.getMessage() and "FCFSPolicy takes over" in record.getMessage()
    assert engine.allocator.num_free_blocks() == 29


def test_a_slow_policy_is_replaced_after_three_strikes(make_engine, caplog):
    slow = After(lambda view: time.sleep(0.06) or make_default_plan(view))
    engine = make_engine(slow)
    engine.add_request("r", [1, 2, 3], max_tokens=20)
    engine.run_until_finished()
    assert slow.calls == 6
    assert "over 50, 3 times in a row" in caplog.text and engine.finished == {"r": "length"}


@pytest.mark.parametrize("method", ["admission_key", "request_finished"])
def test_every_method_of_a_policy_is_timed(make_engine, caplog, method):
    """Also where quick plans come between its slow calls."""

    def wait(self, *args):
        time.sleep(0.06)
        return getattr(FCFSPolicy, method)(self, *args)

    wait.__name__ = method
    policy = type("Slow", (After,), {method: wait})(make_default_plan)
    engine = make_engine(policy)
    for i in range(6):
        engine.add_request(f"r{i}", [1, 2, 3], max_tokens=2)
        engine.run_until_finished()
    assert f"{method} took" in caplog.text and "over 50, 3 times in a row" in caplog.text
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 1
    assert engine.finished == {f"r{i}": "length" for i in range(6)}


def test_one_slow_plan_is_forgiven(make_engine):
    slow = After(lambda view: (time.sleep(0.06) if slow.calls % 3 == 0 else None) or make_default_plan(view))
    engine = make_engine(slow)
    engine.add_request("r", [1, 2, 3], max_tokens=12)
    engine.run_until_finished()
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_a_policy_may_hold_back_while_something_is_in_flight(make_engine):

    class Waiting(FCFSPolicy):
        def schedule(self, view):
            nothing = np.empty(0, np.int64)
            return Grants(nothing, nothing) if view.running.num_in_flight_tokens.any() else make_default_plan(view)

    engine = make_engine(Waiting())
    for i in range(4):
        engine.add_request(f"r{i}", [1, 2, 3], max_tokens=8)
    engine.run_until_finished()
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_excess_is_cut_not_punished(make_engine):
    class Greedy(FCFSPolicy):
        def schedule(self, view):
            rows = np.arange(len(view.running) + len(view.waiting))
            return Grants(rows, np.full(len(rows), 10**6))

    engine = make_engine(Greedy(), rows=3, budget=7, num_blocks=30)
    for i in range(9):
        engine.add_request(f"r{i}", [i] * 9, max_tokens=9)
    for _ in range(20):
        step = engine.launch_step()
        assert step is None or (step.total_num_scheduled_tokens <= 7 and len(step.rows) <= 3)
        while engine.in_flight:
            engine.finish_step()
    engine.run_until_finished()
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


class BadKeys(FCFSPolicy):
    def __init__(self, keys):
        super().__init__()
        self.keys = iter(keys)

    def admission_key(self, request):
        key = next(self.keys)
        if isinstance(key, Exception):
            raise key
        return key


@pytest.mark.parametrize(
    "last",
    [ValueError("a bug"), None, 3, [1], (None,), (float("nan"),), ("text",), (1, 2), ((1,),), (1 + 2j,)],
    ids=repr,
)
def test_a_policy_whose_keys_are_nonsense_is_replaced(make_engine, last):
    engine = make_engine(BadKeys([(3.5,), (2,), (1,), last]), rows=1)
    for i in range(6):
        engine.add_request(f"r{i}", [1, 2], max_tokens=2)
    assert [request.external_request_id for request in engine.scheduler.debug_state().waiting.peek_requests(9)] == [
        f"r{i}" for i in range(6)
    ]
    engine.run_until_finished()
    assert list(engine.finished) == [f"r{i}" for i in range(6)]
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 1


def test_a_rejection_is_an_answer_not_a_fault(make_engine):
    engine = make_engine(BadKeys([(1,), Reject("the tenant is over its quota"), (2,)]))
    engine.add_request("a", [1], max_tokens=1)
    with pytest.raises(QueueFullError, match="over its quota"):
        engine.add_request("b", [1], max_tokens=1)
    engine.add_request("c", [1], max_tokens=1)
    engine.run_until_finished()
    assert list(engine.finished) == ["a", "c"]
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_finished_is_told_and_may_fail(make_engine):
    class Accountant(FCFSPolicy):
        def __init__(self, fails):
            super().__init__()
            self.fails, self.heard = fails, {}

        def request_finished(self, request, usage):
            self.heard[request.request_id] = usage
            if self.fails:
                raise RuntimeError("a bug")

    for fails in (False, True):
        policy = Accountant(fails)
        engine = make_engine(policy)
        engine.add_request("a", [1] * 9, max_tokens=5)
        engine.run_until_finished()
        engine.add_request("b", [1] * 9, max_tokens=5)
        engine.run_until_finished()
        assert engine.scheduler.stats()["plugin_quarantines_total"] == fails
        assert list(policy.heard) == (["a"] if fails else ["a", "b"])
        usage = policy.heard["a"]
        assert (usage.num_prompt_tokens, usage.num_output_tokens, usage.num_preemptions) == (9, 5, 0)
        assert usage.run_ns > 0
        if not fails:
            assert policy.heard["b"].num_cached_tokens == 8


def test_columns_refuse_unknown_names():
    with pytest.raises(TypeError, match="no such column: speed"):
        RequestColumns(speed=np.zeros(1, np.int64))


@pytest.mark.parametrize("unused", [None, 3, "schedule", {"shedule"}, ["schedule"]])
def test_unused_methods_that_are_none_are_refused_and_change_nothing(make_engine, unused):
    engine = make_engine(working := After(raises))
    other = After(raises)
    other.unused_methods = unused
    with pytest.raises(
        PluginError, match="; make it a set of order_waiting, request_finished, schedule, step_scheduled"
    ):
        engine.scheduler.policy_runner.guard.replace_policy(other)
    assert engine.scheduler.policy_runner.guard.policy is working


def test_methods_that_a_policy_names_as_unused_are_not_called(make_engine):
    policy = After(raises)
    policy.calls, policy.unused_methods = 99, frozenset({"schedule"})
    engine = make_engine(policy)
    engine.add_request("a", [1, 2, 3], max_tokens=4)
    engine.run_until_finished()
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0 and policy.calls == 99
