"""How requests end, give way, share their prompt, and what is sent for them."""

import numpy as np
import pytest

from quire.core.contracts.policy import Grants
from quire.core.sched.default_policy_plan import make_default_plan
from quire.core.stats import ENGINE_STATS
from quire.core.testing.fake_kv_worker import compute_expected_tokens
from quire.plugins.sched.fcfs import FCFSPolicy

# ---- how requests end


def test_a_stop_token_ends_and_the_token_after_it_is_dropped(make_engine):
    drawn = compute_expected_tokens(0, [1, 2], 8, 50)
    engine = make_engine()
    engine.add_request("eos", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]])
    engine.add_request("stop", [1, 2], max_tokens=8, seed=0, stop_token_ids=[drawn[3]])
    engine.add_request("ignored", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]], ignore_eos=True)
    engine.add_request("later", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]], min_tokens=5)
    engine.run_until_finished()
    ends = {o.request_id: (o.finish_reason, o.stop_reason) for o in engine.outputs if o.finish_reason}
    assert ends == {
        "eos": ("stop", None),
        "stop": ("stop", drawn[3]),
        "ignored": ("length", None),
        "later": ("length", None),
    }
    assert len(engine.received["eos"]) == 4 and len(engine.received["later"]) == 8


@pytest.mark.parametrize("stops", [[2**40], [-5], [2**20 + 3], list(range(100, 4000))])
def test_unusual_stop_token_ids_do_no_harm(make_engine, stops):
    engine = make_engine(vocab_size=2**20 + 5)
    engine.add_request("r", [1], max_tokens=4, stop_token_ids=stops)
    engine.add_request("s", [1], max_tokens=4)
    engine.run_until_finished()
    assert len(engine.finished) == 2


def test_abort_at_any_moment_returns_everything(make_engine):
    for moment in range(12):
        engine = make_engine(budget=6, num_blocks=20)
        engine.add_request("a", [1] * 10, max_tokens=6)
        engine.add_request("b", [2] * 10, max_tokens=6)
        for _ in range(moment):
            engine.run_step()
        if "a" not in engine.finished:
            engine.abort_request("a")
            assert engine.allocator.debug_state().tables.keys() <= {"b"}
        engine.run_until_finished()
        assert engine.finished["b"] == "length" and engine.allocator.num_free_blocks() == 19
    assert not engine.scheduler.abort_request("a")


def test_a_failed_step_ends_its_own_requests_only(make_engine):
    engine = make_engine(rows=2)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 9, max_tokens=3)
    engine.launch_step()
    engine.launch_step()
    ended = engine.fail_step()
    assert [(o.request_id, o.finish_reason, o.error) for o in ended] == [
        ("r0", "error", "the worker failed"),
        ("r1", "error", "the worker failed"),
    ]
    assert engine.allocator.stats().num_cached == 0, "what a failed step wrote must not be found"
    engine.run_until_finished()
    assert engine.finished == {"r0": "error", "r1": "error", "r2": "length"}
    assert engine.allocator.num_free_blocks() == 63


# ---- preemption


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


def test_the_policy_may_choose_the_victims_but_not_the_oldest(make_engine):
    class OldestFirst(FCFSPolicy):
        def schedule(self, view):
            grants = make_default_plan(view)
            return Grants(grants.request_indices, grants.num_scheduled_tokens, np.arange(len(view.running)))

    engine = make_engine(OldestFirst(), num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=17)
    while engine.scheduler.stats()["num_preemptions_total"] == 0:
        engine.run_step()
    assert [entry.request_id for entry in engine.scheduler.debug_state().waiting] == ["r1"]
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


# ---- what is sent


def test_logprobs_are_sent_with_their_tokens(make_engine):
    engine = make_engine(budget=5)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    engine.add_request("r", prompt, max_tokens=3, logprobs=0, prompt_logprobs=0)
    engine.add_request("s", [1], max_tokens=3)
    engine.run_until_finished()
    outputs = [output for output in engine.outputs if output.request_id == "r"]
    assert [output.logprobs[0].token_ids for output in outputs] == [[token] for token in engine.received["r"]]
    assert [position.token_ids[0] for position in outputs[0].prompt_logprobs] == prompt[1:]
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert all(output.logprobs is None for output in engine.outputs if output.request_id == "s")


def test_prompt_logprobs_survive_preemption(make_engine):
    engine = make_engine(num_blocks=17, budget=4, watermark=0.0)
    prompt = list(range(20))
    engine.add_request("old", [1] * 30, max_tokens=30)
    for _ in range(9):
        engine.run_step()
    engine.add_request("r", prompt, max_tokens=5, prompt_logprobs=0)
    engine.run_until_finished()
    (sent,) = [o.prompt_logprobs for o in engine.outputs if o.request_id == "r" and o.prompt_logprobs is not None]
    assert [position.token_ids[0] for position in sent] == prompt[1:]


def test_the_first_output_tells_of_cache_and_queue(make_engine):
    engine = make_engine(rows=1)
    engine.add_request("a", [1] * 9, max_tokens=2)
    engine.add_request("b", [1] * 9, max_tokens=2)
    engine.run_until_finished()
    first = {o.request_id: o for o in reversed(engine.outputs)}
    assert first["a"].num_cached_tokens == 0 and first["b"].num_cached_tokens == 8
    assert first["b"].queue_ns > first["a"].queue_ns


def test_stats_have_the_promised_names(make_engine):
    engine = make_engine()
    engine.add_request("a", [1] * 9, max_tokens=4)
    engine.add_request("b", [1] * 9, max_tokens=4)
    engine.launch_step()
    stats = engine.scheduler.stats()
    assert stats.keys() <= ENGINE_STATS.keys()
    assert stats["num_requests_running"] == 2 and 0 < stats["kv_cache_usage_perc"] < 1
    engine.run_until_finished()
    stats = engine.scheduler.stats()
    assert stats["prompt_tokens_total"] == 18 and stats["generation_tokens_total"] == 8
    assert stats["kv_cache_usage_perc"] == 0
