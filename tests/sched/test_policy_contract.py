"""What a policy is told, and what it can ask for: groups, refusals, reports, prefixes, and the options of the plan."""

import contextlib
import copy
import gc
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest

from quire.core.contracts.policy import (
    MIN_PREFILL_TOKENS,
    NO_DEADLINE,
    Grants,
    RequestColumns,
    StepView,
    make_default_plan,
)
from quire.core.request import Request
from quire.core.sched.checked_plan import PlanLimits
from quire.core.sched.default_policy_plan import check_plan
from quire.core.sched.request_columns import StateColumns
from quire.core.sched.request_groups import GroupTable
from quire.core.scheduling_params import SchedulingParams
from quire.plugins.sched.fcfs import FCFSPolicy


class Recording(FCFSPolicy):
    """First come, first served, and keeps what it was told."""

    reads_prefix_cache = True

    def __init__(self):
        super().__init__()
        self.infos, self.views, self.reports = [], [], []

    def admission_key(self, request):
        self.infos.append(request)
        return super().admission_key(request)

    def group_key(self, request):
        return request.group

    def schedule(self, view):
        waiting = view.waiting
        seen = {name: getattr(waiting, name).tolist() for name in ("group", "num_cached_tokens", "deadline_ns")}
        for name in ("num_running", "num_waiting", "num_prompt_tokens", "num_output_tokens"):
            getattr(view.groups, name)  # columns are made when they are read, and valid until this returns
        self.views.append((view, seen))
        return make_default_plan(view)

    def step_scheduled(self, report):
        self.reports.append(report)


def test_a_request_tells_the_policy_what_its_client_said(make_engine):
    policy = Recording()
    engine = make_engine(policy)
    said = SchedulingParams(
        group="a",
        deadline_ms=500,
        ttft_target_ms=200.5,
        tpot_target_ms=20,
        predicted_tokens=99,
        tags={"tier": "gold"},
    )
    engine.launch_step()
    engine.add_request("r", [1, 2, 3], max_tokens=7, scheduling=said)
    engine.add_request("silent", [1, 2, 3], max_tokens=7)
    engine.run_until_finished()
    told, silent = policy.infos
    assert (told.group, told.predicted_tokens, dict(told.tags)) == ("a", 7, {"tier": "gold"})
    assert told.deadline_ns == told.arrival_ns + 500_000_000
    assert (told.ttft_target_ns, told.tpot_target_ns) == (200_500_000, 20_000_000)
    assert (silent.group, silent.deadline_ns, silent.predicted_tokens, dict(silent.tags)) == (None, NO_DEADLINE, 0, {})
    assert told.request_number == engine.numbers["r"]
    with pytest.raises(TypeError):
        told.tags["tier"] = "iron"
    _, seen = policy.views[0]
    assert seen["deadline_ns"] == [told.deadline_ns, NO_DEADLINE]


def test_groups_have_queues_of_their_own_and_their_use_is_counted(make_engine):
    policy = Recording()
    engine = make_engine(policy, rows=2, budget=64, num_blocks=200)
    for i in range(600):
        engine.add_request(f"a{i}", [1, 2, 3, i], max_tokens=2, scheduling=SchedulingParams(group="a"))
    engine.add_request("b", [9] * 10, max_tokens=5, scheduling=SchedulingParams(group="b"))
    engine.run_step()
    view, seen = policy.views[0]
    assert view.groups.keys == ("a", "b") and view.groups.num_waiting.tolist() == [600, 1]
    assert set(seen["group"]) == {0, 1}, "the view shows the small group behind 600 requests of the other"
    engine.abort_request("a599")
    while "b" not in engine.finished:
        engine.run_step()
    engine.add_request("c", [1], max_tokens=1)
    engine.run_step()
    view, _ = policy.views[-1]
    assert view.groups.keys == ("a", "b", None)
    # The last token of an answer is never computed, unless a step was scheduled before the stop was seen.
    assert view.groups.num_prompt_tokens[1] == 10 and view.groups.num_output_tokens[1] in (4, 5)
    assert view.groups.num_running[1] == view.groups.num_waiting[1] == 0
    assert view.groups.num_running[0] + view.groups.num_waiting[0] <= 599


def test_a_prompt_token_that_is_computed_alone_is_of_the_prompt(make_engine):
    policy = Recording()
    engine = make_engine(policy, budget=9)
    engine.add_request("r", [9] * 10, max_tokens=3)
    engine.run_until_finished()
    assert [report.num_scheduled_tokens.tolist() for report in policy.reports][:2] == [[9], [1]]
    engine.add_request("next", [1], max_tokens=1)
    engine.run_step()
    groups = policy.views[-1][0].groups
    assert (groups.num_prompt_tokens.tolist(), groups.num_output_tokens.tolist()) == ([10], [2])


def test_the_table_of_groups_is_bounded():
    running = StateColumns(1)
    table = GroupTable(running, max_idle_groups=3)
    busy = table.add_request("busy")
    for i in range(100):
        index = table.add_request(f"g{i}")
        running.group[0], running.prompt_len[0], running.num_computed_tokens[0] = index, 3, 5
        running.num_counted_tokens[0] = 0
        table.remove_row(0)
        table.remove_request(index)
    assert len(table) <= 6 and table.add_request("busy") == busy
    remembered = table.view_columns(np.zeros(0, np.int64))
    used = remembered.num_output_tokens[[key is not None and key != "busy" for key in remembered.keys]]
    assert used.tolist() == [2, 2, 2]
    assert remembered.num_waiting.sum() == 2


def test_a_policy_is_told_once_a_step_what_became_of_its_plan(make_engine):
    policy = Recording()
    engine = make_engine(policy, num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    engine.run_until_finished()
    steps = [report.step for report in policy.reports]
    assert steps == list(range(len(steps))), "one report a step"
    preempted = [number for report in policy.reports for number in report.preempted]
    assert len(preempted) == engine.scheduler.stats()["num_preemptions_total"] > 0
    admitted = [number for report in policy.reports for number in report.admitted]
    assert sorted(admitted) == sorted([0, 1, 2, *preempted])
    gained = {}
    for report in policy.reports:
        for finished in report.finished_steps:
            for number, count in zip(finished.request_numbers.tolist(), finished.num_new_tokens.tolist(), strict=True):
                gained[number] = gained.get(number, 0) + count
    assert set(gained.values()) <= {15, 16, 17, 18}, "without the last two steps, with those after an end"


def test_a_policy_sees_what_is_cached_and_what_is_shared(make_engine):
    policy = Recording()
    engine = make_engine(policy, rows=1, num_blocks=100)
    shared = list(range(10, 20))
    engine.add_request("first", [*shared, 1], max_tokens=1)
    engine.run_until_finished()
    engine.add_request("second", [*shared, 2, 3, 4, 5], max_tokens=1)
    engine.add_request("third", [*shared, 2, 3, 4, 5], max_tokens=1)
    engine.add_request("other", [1, 2, 3, 4, 5], max_tokens=1)
    engine.run_until_finished()
    first, second, third, other = policy.infos
    assert (first.num_cached_tokens, second.num_cached_tokens, third.num_cached_tokens) == (0, 8, 8)
    assert first.prefix_hash == other.prefix_hash == 0 != second.prefix_hash != third.prefix_hash != 0
    cached = [seen["num_cached_tokens"] for _, seen in policy.views if seen["num_cached_tokens"]]
    assert [8, 8, 0] in cached and [12, 0] in cached, "the second's blocks are cached when the third is looked at"


class Picky(FCFSPolicy):
    """Refuses whoever it is told to, and grants the others."""

    def __init__(self, refuse):
        super().__init__()
        self.refuse = refuse

    def schedule(self, view):
        grants = make_default_plan(view)
        for i in range(len(view.waiting)):
            if self.refuse(view, i):
                grants.refuse(len(view.running) + i, "too late")
        return grants


def test_a_refused_request_ends_at_once_and_only_that(make_engine):
    policy = Picky(lambda view, i: view.waiting.priority[i] > 0)
    engine = make_engine(policy, rows=2)
    for i in range(8):
        engine.add_request(f"r{i}", [i] * 5, max_tokens=3, priority=i % 2)
    engine.run_until_finished()
    assert engine.finished == {f"r{i}": "error" if i % 2 else "length" for i in range(8)}
    refused = [output for output in engine.outputs if output.finish_reason == "error"]
    assert {output.error_kind for output in refused} == {"deadline_unmeetable"}
    assert refused[0].error == "the deadline cannot be met: too late"
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_all_may_be_refused(make_engine):
    engine = make_engine(Picky(lambda view, i: True))
    for i in range(40):
        engine.add_request(f"r{i}", [i] * 5, max_tokens=3)
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"error"} and len(engine.finished) == 40
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


def test_a_request_with_tokens_is_not_refused(make_engine):
    """It was preempted: its client has part of the answer."""
    policy = Picky(lambda view, i: view.waiting.output_len[i] > 0)
    engine = make_engine(policy, num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    engine.run_until_finished()
    assert engine.scheduler.stats()["num_preemptions_total"] > 0
    assert set(engine.finished.values()) == {"length"}


@pytest.mark.parametrize(
    "bad", [lambda g: g.refuse(0, "runs"), lambda g: g.refuse(99, "x"), lambda g: g.refuse("r", 1)]
)
def test_a_refusal_of_what_does_not_wait_is_a_fault(make_engine, bad):
    class Bad(FCFSPolicy):
        def schedule(self, view):
            grants = make_default_plan(view)
            if len(view.running):
                grants.refuse(bad, "a reason")
            return grants

    engine = make_engine(Bad())
    engine.add_request("r", [1, 2], max_tokens=5)
    engine.run_until_finished()
    assert engine.finished == {"r": "length"} and engine.scheduler.stats()["plugin_quarantines_total"] == 1


@pytest.mark.parametrize("key", [1.5, ("a",), b"a", ["a"]])
def test_a_group_that_is_none_is_a_fault(make_engine, key):
    class Odd(Recording):
        def group_key(self, request):
            return key if request.request_id == "r2" else request.group

    engine = make_engine(Odd())
    for i in range(4):
        engine.add_request(f"r{i}", [1, 2], max_tokens=5, scheduling=SchedulingParams(group=f"g{i}"))
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"} and len(engine.finished) == 4
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 1


def make_view(running, waiting, budget=8192, rows=8):
    def columns(remaining):
        return RequestColumns(num_remaining_tokens=np.array(remaining, np.int64))

    return StepView(0, budget, rows, 100, 16, columns(running), columns(waiting))


def plan_of(view, **options):
    grants = make_default_plan(view, **options)
    return dict(zip(grants.request_indices.tolist(), grants.num_scheduled_tokens.tolist(), strict=True))


def test_options_of_the_default_plan():
    view = make_view([1, 1], [50, 60, 70], budget=100)
    assert plan_of(view) == {0: 1, 1: 1, 2: 50}, "a prompt that fits a step whole is not cut beside another"
    order = np.array([2, 0])
    assert list(plan_of(view, waiting_order=order).items()) == [(0, 1), (1, 1), (4, 70)]
    assert plan_of(view, waiting_order=np.array([], np.int64)) == {0: 1, 1: 1}
    assert plan_of(view, token_budget=30) == {0: 1, 1: 1, 2: 28}
    assert plan_of(make_view([1], [9000]), min_prefill_tokens=100) == {0: 1, 1: 4500}
    assert plan_of(make_view([1], [2000]), min_prefill_tokens=MIN_PREFILL_TOKENS) == {0: 1, 1: 1536}
    assert make_default_plan(view, victims=np.array([1, 0])).victims.tolist() == [1, 0]


def cap_rows(view):
    view.num_free_rows = min(view.num_free_rows, 1)
    return make_default_plan(view)


def cap_budget(view):
    view.token_budget //= 4
    return make_default_plan(view)


def plan_a_smaller_view(view):
    smaller = replace(view, num_free_rows=min(view.num_free_rows, 1), token_budget=view.token_budget // 4)
    return make_default_plan(smaller)


def hide_prompts(view):
    remaining = view.waiting.num_remaining_tokens.copy()
    remaining[1:] = 0
    return make_default_plan(replace(view, waiting=RequestColumns(num_remaining_tokens=remaining)))


def plan_then_cap(view):
    plan = make_default_plan(view)
    view.num_free_rows, view.token_budget = 0, 0
    return plan


@pytest.mark.parametrize("plan_view", [cap_rows, cap_budget, plan_a_smaller_view, hide_prompts, plan_then_cap])
def test_a_default_plan_is_that_of_the_view_it_was_made_from_read_or_not(make_engine, plan_view):
    def run(is_read):
        class Capped(Recording):
            def schedule(self, view):
                plan = plan_view(view)
                assert not is_read or len(plan.request_indices) == len(plan.num_scheduled_tokens)
                return plan

        engine = make_engine(policy := Capped())
        for i in range(6):
            engine.add_request(f"r{i}", [i] * 5, max_tokens=4)
        engine.run_until_finished()
        assert set(engine.finished.values()) == {"length"}
        assert engine.scheduler.stats()["plugin_quarantines_total"] == 0
        return [(len(report.admitted), report.num_scheduled_tokens.tolist()) for report in policy.reports]

    steps = run(is_read=False)
    assert steps == run(is_read=True)
    num_admitted = max(num_admitted for num_admitted, _ in steps)
    if plan_view is cap_budget:
        assert max(sum(tokens) for _, tokens in steps) <= 32 // 4
    else:
        assert num_admitted == (6 if plan_view is plan_then_cap else 1)


def test_what_is_written_into_a_column_of_the_view_changes_no_default_plan(make_engine):
    class Writing(Recording):
        def schedule(self, view):
            for columns in (view.running, view.waiting):
                columns.num_remaining_tokens.flags.writeable = True
                columns.num_remaining_tokens[:] = 1
            return make_default_plan(view)

    engine = make_engine(policy := Writing())
    engine.add_request("r", [1, 2, 3, 4, 5], max_tokens=2)
    engine.run_until_finished()
    assert [report.num_scheduled_tokens.tolist() for report in policy.reports] == [[5], [1]]


def test_a_default_plan_can_be_changed_copied_and_kept():
    view = make_view([1, 1], [50, 60], budget=100)
    victims = np.array([1, 0])
    for plan in (
        replace(make_default_plan(view), victims=victims),
        copy.deepcopy(make_default_plan(view, victims=victims)),
        pickle.loads(pickle.dumps(make_default_plan(view, victims=victims))),
        Grants(**asdict(make_default_plan(view, victims=victims))),
    ):
        assert plan.request_indices.tolist() == [0, 1, 2] and plan.num_scheduled_tokens.tolist() == [1, 1, 50]
        assert plan.victims.tolist() == [1, 0] and plan.refusals == []
        assert isinstance(plan, Grants)
        result = check_plan(plan, PlanLimits.of_view(view), PlanLimits.from_view(view))
        assert result.victims == [1, 0] and result.request_indices.tolist() == [0, 1, 2]
    fewer = replace(make_default_plan(view), num_scheduled_tokens=np.array([1, 1, 7]))
    result = check_plan(fewer, PlanLimits.of_view(view), PlanLimits.from_view(view))
    assert result.num_scheduled_tokens.tolist() == [1, 1, 7]


@pytest.mark.parametrize("bad", [[-1], [0, 0], [3], [0.5]])
def test_a_default_plan_in_a_bad_order_is_checked(bad):
    view = make_view([1], [50, 60, 70])
    with contextlib.suppress(TypeError, IndexError):  # the policy's own call raises where it can
        plan = make_default_plan(view, waiting_order=np.array(bad))
        seen, limits = PlanLimits.of_view(view), PlanLimits.from_view(view)
        assert plan.make_trusted(seen, limits) is None


def test_reports_can_be_kept_copied_and_changed(make_engine):
    engine = make_engine(policy := Recording())
    for i in range(3):
        engine.add_request(f"kept{i}", [i] * 5, max_tokens=4)
    engine.run_until_finished()
    numbers = sorted(engine.numbers.values())
    del engine
    policy.views.clear()  # valid until ``schedule`` returned
    gc.collect()
    requests = [found for found in gc.get_objects() if type(found) is Request]
    assert not any(request.external_request_id.startswith("kept") for request in requests), "kept by a report"
    for report in policy.reports:
        for same in (copy.deepcopy(report), pickle.loads(pickle.dumps(report)), replace(report, now_ns=report.now_ns)):
            assert repr(same) == repr(report)
            assert sorted(same.request_numbers) == numbers
        for finished in report.finished_steps:
            assert replace(finished, device_us=5.0).request_numbers.tolist() == finished.request_numbers.tolist()
    assert asdict(policy.reports[0])["num_scheduled_tokens"].tolist() == [5, 5, 5]
