"""How requests are preempted, admitted and forked."""

import numpy as np

from quire.core.contracts.policy import Grants
from quire.core.sched.default_policy_plan import make_default_plan
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.sched.priority import PriorityPolicy

# ---- preemption and admission


def test_the_youngest_is_preempted_and_loses_nothing(make_engine):
    engine = make_engine(num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    engine.run_until_finished()
    assert engine.scheduler.stats()["num_preemptions_total"] > 0
    assert list(engine.finished) == ["r0", "r1", "r2"]


def test_no_request_is_admitted_in_a_step_that_preempts(make_engine):
    engine = make_engine(num_blocks=11, watermark=0.0)
    for i in range(4):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    preempted = 0
    while engine.scheduler.has_unfinished_requests:
        step = engine.launch_step()
        now = engine.scheduler.stats()["num_preemptions_total"]
        assert now == preempted or step.new_requests == []
        preempted = now
        while engine.in_flight:
            engine.finish_step()
    assert preempted > 0


def test_blocks_ahead_never_pass_the_end(make_engine):
    engine = make_engine(rows=2, num_blocks=64)
    engine.add_request("r", [1] * 5, max_tokens=12)
    held = []
    while engine.scheduler.has_unfinished_requests:
        engine.run_step()
        held += [engine.allocator.stats().num_blocks - engine.allocator.stats().num_free]
    assert max(held) == 4, "16 tokens are ever computed"
    assert 3 not in held, "many blocks are free, so decoding gets several at a time"


def test_a_policy_that_only_ranks_ranks_victims(make_engine):
    """The urgent request came last, when the lazy ones ran already: one of these is preempted, the laziest."""
    engine = make_engine(PriorityPolicy(), num_blocks=13, watermark=0.0)
    for name, priority in (("lazy", 1), ("laziest", 2), ("urgent", -1)):
        engine.add_request(name, [priority + 2] * 8, max_tokens=17, priority=priority)
        engine.run_step()
    assert engine.scheduler.num_running == 3
    while engine.scheduler.stats()["num_preemptions_total"] == 0:
        engine.run_step()
    assert [entry.external_request_id for entry in engine.scheduler.debug_state().waiting] == ["laziest"]
    engine.run_until_finished()
    assert engine.outputs and list(engine.finished)[-1] == "laziest"


def test_the_policy_may_choose_the_victims_but_not_the_first_in_rank(make_engine):
    class OldestFirst(FCFSPolicy):
        def schedule(self, view):
            grants = make_default_plan(view)
            return Grants(grants.request_indices, grants.num_scheduled_tokens, np.arange(len(view.running)))

    engine = make_engine(OldestFirst(), num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    while engine.scheduler.stats()["num_preemptions_total"] == 0:
        engine.run_step()
    assert [entry.external_request_id for entry in engine.scheduler.debug_state().waiting] == ["r1"]
    engine.run_until_finished()


def test_waiting_requests_leave_blocks_for_running_ones(make_engine):
    engine = make_engine(num_blocks=21, watermark=0.2, budget=32)
    engine.add_request("long", [1] * 60, max_tokens=2, seed=1)
    engine.launch_step()
    engine.add_request("short", [2] * 8, max_tokens=2)
    step = engine.launch_step()
    assert step.num_scheduled_tokens.tolist() == [28], (
        "the long prompt needs 15 blocks and 4 are the watermark: 2 do not fit"
    )
    engine.run_until_finished()
    assert engine.scheduler.stats()["num_preemptions_total"] == 0


def test_a_waiting_request_without_blocks_is_not_tried_in_every_step(make_engine, monkeypatch):
    engine = make_engine(num_blocks=21, watermark=0.0)
    engine.add_request("long", [1] * 32, max_tokens=32, seed=1)
    engine.launch_step()
    engine.add_request("wide", [2] * 60, max_tokens=1)
    tries = []
    match = engine.allocator.match_prefix
    monkeypatch.setattr(engine.allocator, "match_prefix", lambda request: tries.append(request) or match(request))
    while "long" not in engine.finished:
        engine.run_step()
    assert 2 <= len(tries) <= 6
    engine.run_step()
    assert engine.scheduler.num_running == 1, "the blocks are free again: no further delay"
    engine.run_until_finished()


def test_grants_to_who_does_not_fit_do_not_stop_the_others(make_engine):
    """The policy gives the whole budget to a waiting request, for which there are no blocks."""

    class WaitingFirst(FCFSPolicy):
        def schedule(self, view):
            grants = make_default_plan(view)
            return Grants(grants.request_indices[::-1], np.full(len(grants.request_indices), view.token_budget))

    engine = make_engine(WaitingFirst(), num_blocks=11, watermark=0.0, budget=8)
    engine.add_request("long", [1] * 30, max_tokens=8)
    for _ in range(5):
        engine.run_step()
    engine.add_request("wide", [2] * 30, max_tokens=1)
    engine.run_until_finished()
    assert list(engine.finished) == ["long", "wide"]
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0


# ---- forks


def test_children_share_the_prompt_of_their_parent(make_engine):
    engine = make_engine(budget=64, num_blocks=40)
    for i in range(4):
        engine.add_request(f"r{i}", [1] * 30, max_tokens=6, parent="r0" if i else None)
    first, second = engine.launch_step(), engine.launch_step()
    assert (len(first.rows), len(second.rows)) == (1, 4)
    assert second.num_scheduled_tokens.tolist() == [1] * 4 and len(second.block_copies) == 3
    assert engine.allocator.num_free_blocks() == 39 - 8 - 3
    engine.run_until_finished()
    assert len({tuple(tokens) for tokens in engine.received.values()}) == 4


def test_the_prompt_of_a_fork_group_is_counted_once(make_engine):
    """What children find because their parent computed it is no hit of the request, nor a prompt of its own."""
    engine = make_engine(budget=64, num_blocks=40)
    for i in range(3):
        engine.add_request(f"r{i}", [1] * 30, max_tokens=6, parent="r0" if i else None)
    engine.run_until_finished()
    assert [output.num_cached_tokens for output in engine.outputs] == [0] * len(engine.outputs)
    assert engine.scheduler.stats()["prompt_tokens_total"] == 30


def test_children_outlive_their_parent(make_engine):
    for moment in range(4):
        engine = make_engine(budget=10, num_blocks=40)
        for i in range(3):
            engine.add_request(f"r{i}", [1] * 30, max_tokens=6, parent="r0" if i else None)
        for _ in range(moment):
            engine.run_step()
        engine.abort_request("r0")
        engine.run_until_finished()
        assert engine.finished == {"r0": "abort", "r1": "length", "r2": "length"}


def test_a_child_may_leave_before_its_parent_has_come_far(make_engine):
    engine = make_engine(budget=10)
    engine.add_request("parent", [1] * 30, max_tokens=2)
    engine.add_request("child", [1] * 30, max_tokens=2, parent="parent")
    engine.launch_step()
    engine.abort_request("child")
    engine.run_until_finished()
    assert not engine.scheduler.debug_state().fork_groups and engine.scheduler.num_waiting == 0


def test_only_a_request_of_the_same_prompt_and_salt_is_forked(make_engine):
    engine = make_engine(budget=64)
    engine.add_request("parent", [1] * 20, max_tokens=4)
    engine.launch_step()
    engine.add_request("other prompt", [2] * 20, max_tokens=4, parent="parent")
    engine.add_request("other salt", [1] * 20, max_tokens=4, parent="parent", salt="mine")
    engine.add_request("gone", [1] * 20, max_tokens=4, parent="no such request")
    step = engine.launch_step()
    assert [new.num_computed_tokens for new in step.new_requests] == [0, 0, 0]
    engine.run_until_finished()
