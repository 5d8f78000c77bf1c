"""What the scheduler promises, one promise a test."""

import numpy as np
import pytest

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.contracts.policy import Grants, default_plan
from quire.core.errors import ConfigError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreRequest
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.core.stats import ENGINE_STATS
from quire.core.testing.marking_worker import expected_tokens
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy


def launch_all(engine, most=100):
    """Launch steps until none can run, and land them as they come; the steps."""
    steps = []
    for _ in range(most):
        step = engine.launch()
        if step is not None:
            steps.append(step)
        if not engine.flights:
            break
        if step is None or len(engine.flights) == 2:
            engine.land()
    return steps


# ---- planning


def test_planning_never_waits_for_a_token(make_engine):
    engine = make_engine(depth=50)
    engine.add("r", [1, 2, 3], max_tokens=20)
    steps = []
    while (step := engine.launch()) is not None:
        steps.append(step)
    assert [step.total_tokens for step in steps] == [3] + [1] * 19
    assert all(step.samples.all() for step in steps)
    while engine.flights:
        engine.land()
    assert engine.finished == {"r": "length"} and len(engine.received["r"]) == 20


def test_prompts_go_in_chunks_after_the_decodes(make_engine):
    engine = make_engine(budget=10)
    engine.add("a", [1] * 4, max_tokens=20)
    engine.launch()
    engine.add("b", [2] * 25, max_tokens=20)
    shapes = []
    for _ in range(4):
        step = engine.launch()
        shapes.append((step.num_tokens.tolist(), step.samples.tolist(), step.num_decodes))
        engine.land()
    assert shapes == [
        ([1, 9], [True, False], 1),
        ([1, 9], [True, False], 1),
        ([1, 7], [True, True], 1),
        ([1, 1], [True, True], 2),
    ]


def test_without_chunks_a_prompt_goes_whole_or_waits(make_engine):
    engine = make_engine(budget=64, chunked=False, max_model_len=64, num_blocks=200)
    for i, size in enumerate((40, 30, 20)):
        engine.add(f"r{i}", [i] * size, max_tokens=4)
    assert [step.num_tokens.tolist()[step.num_decodes :] for step in launch_all(engine)][:3] == [[40], [30, 20], []]


def test_without_chunks_the_budget_must_hold_the_longest_prompt():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=63 cannot hold.*max_model_len=64.*raise it"):
        make_scheduler(SchedulerConfig(4, 63, chunked_prefill=False), max_model_len=64)


def test_rows_are_stable_and_announced_when_freed(make_engine):
    engine = make_engine(rows=2)
    for i in range(4):
        engine.add(f"r{i}", [i], max_tokens=2 + i)
    seen = []
    for step in launch_all(engine):
        seen.append((step.freed_rows, [(new.row, new.request_id) for new in step.new_requests]))
    assert [entry for entry in seen if entry != ([], [])] == [
        ([], [(0, "r0"), (1, "r1")]),
        ([0], [(0, "r2")]),
        ([1], [(1, "r3")]),
        ([0], []),
    ]


def test_max_seq_len_counts_the_new_tokens(make_engine):
    engine = make_engine()
    engine.add("r", [1] * 5, max_tokens=3)
    assert [step.max_seq_len for step in launch_all(engine)] == [5, 6, 7]


def test_cached_prefixes_give_budget_back_within_the_step(make_engine):
    engine = make_engine(budget=20, rows=8, num_blocks=100)
    engine.add("first", [1] * 17, max_tokens=1)
    engine.run()
    for i in range(4):
        engine.add(f"r{i}", [1] * 17, max_tokens=1)
    step = engine.launch()
    assert step.num_tokens.tolist() == [1] * 4 and [new.num_computed for new in step.new_requests] == [16] * 4


def test_generated_tokens_are_found_when_their_request_has_ended(make_engine):
    engine = make_engine(budget=64, max_model_len=64)
    engine.add("r", [1, 2, 3], max_tokens=10)
    engine.run()
    engine.add("next", [1, 2, 3, *engine.received["r"], 5], max_tokens=1)
    engine.run()
    assert engine.outputs[-1].num_cached_tokens == 12


# ---- what add() refuses


def make_scheduler(config=None, *, max_model_len=64, num_blocks=64, groups=(KVGroup(1),)):
    engine_config = config or SchedulerConfig(4, 64)
    allocator = PagedAllocator(groups, num_blocks, 4)
    return Scheduler(
        engine_config, CacheConfig(4), allocator, FCFSPolicy(), fallback=FCFSPolicy(), max_model_len=max_model_len
    )


def request(request_id, prompt, **params):
    return EngineCoreRequest(request_id, prompt, SamplingParams(**params), 0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "0 tokens"), ([1] * 64, "64 tokens.*max_model_len=64.*at most 63.*shorten")],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        make_scheduler().add(request("r", prompt))
    assert not isinstance(caught.value, QueueFullError)


def test_a_request_that_can_never_fit_is_refused():
    scheduler = make_scheduler(num_blocks=9)
    scheduler.add(request("fits", [1] * 20, max_tokens=13))
    with pytest.raises(InvalidRequestError, match=r"34 tokens.*9 KV blocks of 4.*has 8.*lower max_tokens"):
        scheduler.add(request("does not", [1] * 20, max_tokens=14))
    assert scheduler.num_waiting == 1


def test_a_window_needs_fewer_blocks():
    scheduler = make_scheduler(SchedulerConfig(4, 8), num_blocks=9, groups=(KVGroup(1, window=8),))
    scheduler.add(request("r", [1] * 20, max_tokens=40))


def test_a_known_id_and_a_full_queue_are_refused():
    scheduler = make_scheduler(SchedulerConfig(4, 64, max_queued=2))
    scheduler.add(request("r", [1]))
    with pytest.raises(InvalidRequestError, match="'r' is already in use"):
        scheduler.add(request("r", [1]))
    scheduler.add(request("s", [1]))
    with pytest.raises(QueueFullError, match="2 requests are queued and max_queued=2; try again later"):
        scheduler.add(request("t", [1]))
    scheduler.schedule()
    scheduler.add(request("t", [1]))


# ---- how requests end


def test_a_stop_token_ends_and_the_token_after_it_is_dropped(make_engine):
    drawn = expected_tokens(0, [1, 2], 8, 50)
    engine = make_engine()
    engine.add("eos", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]])
    engine.add("stop", [1, 2], max_tokens=8, seed=0, stop_token_ids=[drawn[3]])
    engine.add("ignored", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]], ignore_eos=True)
    engine.add("later", [1, 2], max_tokens=8, seed=0, eos=[drawn[3]], min_tokens=5)
    engine.run()
    ends = {o.request_id: (o.finish_reason, o.stop_reason) for o in engine.outputs if o.finish_reason}
    assert ends == {
        "eos": ("stop", None),
        "stop": ("stop", drawn[3]),
        "ignored": ("length", None),
        "later": ("length", None),
    }
    assert len(engine.received["eos"]) == 4 and len(engine.received["later"]) == 8


@pytest.mark.parametrize("stops", [[2**40], [-5], [2**20 + 3], list(range(100, 4000))])
def test_odd_stop_tokens_hurt_nobody(make_engine, stops):
    engine = make_engine(vocab_size=2**20 + 5)
    engine.add("r", [1], max_tokens=4, stop_token_ids=stops)
    engine.add("s", [1], max_tokens=4)
    engine.run()
    assert len(engine.finished) == 2


def test_abort_at_any_moment_returns_everything(make_engine):
    for moment in range(12):
        engine = make_engine(budget=6, num_blocks=20)
        engine.add("a", [1] * 10, max_tokens=6)
        engine.add("b", [2] * 10, max_tokens=6)
        for _ in range(moment):
            engine.turn()
        if "a" not in engine.finished:
            engine.abort("a")
            assert engine.allocator._tables.keys() <= {"b"}
        engine.run()
        assert engine.finished["b"] == "length" and engine.allocator.num_free() == 19
    assert not engine.scheduler.abort("a")


def test_a_failed_step_ends_its_own_requests_only(make_engine):
    engine = make_engine(rows=2)
    for i in range(3):
        engine.add(f"r{i}", [i] * 9, max_tokens=3)
    engine.launch()
    engine.launch()
    ended = engine.drop()
    assert [(o.request_id, o.finish_reason, o.error) for o in ended] == [
        ("r0", "error", "the worker failed"),
        ("r1", "error", "the worker failed"),
    ]
    assert engine.allocator.stats().num_cached == 0, "what a failed step wrote must not be found"
    engine.run()
    assert engine.finished == {"r0": "error", "r1": "error", "r2": "length"}
    assert engine.allocator.num_free() == 63


# ---- preemption


def test_the_youngest_is_preempted_and_loses_nothing(make_engine):
    engine = make_engine(num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add(f"r{i}", [i] * 8, max_tokens=17)
    engine.run()
    assert engine.scheduler.stats()["num_preemptions_total"] > 0
    assert list(engine.finished) == ["r0", "r1", "r2"]


def test_the_policy_may_choose_the_victims_but_not_the_oldest(make_engine):
    class OldestFirst(FCFSPolicy):
        def plan(self, view):
            grants = default_plan(view)
            return Grants(grants.rows, grants.tokens, np.arange(len(view.running)))

    engine = make_engine(OldestFirst(), num_blocks=11, watermark=0.0)
    for i in range(3):
        engine.add(f"r{i}", [i] * 8, max_tokens=17)
    while engine.scheduler.stats()["num_preemptions_total"] == 0:
        engine.turn()
    assert [entry.request_id for entry in engine.scheduler._queue] == ["r1"]
    engine.run()


def test_newcomers_leave_room_for_those_who_run(make_engine):
    engine = make_engine(num_blocks=21, watermark=0.2, budget=16)
    engine.add("long", [1] * 60, max_tokens=2, seed=1)
    engine.launch()
    engine.add("short", [2] * 8, max_tokens=2)
    step = engine.launch()
    assert len(step.rows) == 1, "15 blocks are promised to the long prompt and 4 are the watermark: 2 do not fit"
    engine.run()
    assert engine.scheduler.stats()["num_preemptions_total"] == 0


# ---- families


def test_children_share_the_prompt_of_their_parent(make_engine):
    engine = make_engine(budget=64, num_blocks=40)
    for i in range(4):
        engine.add(f"r{i}", [1] * 30, max_tokens=6, parent="r0" if i else None)
    first, second = engine.launch(), engine.launch()
    assert (len(first.rows), len(second.rows)) == (1, 4)
    assert second.num_tokens.tolist() == [1] * 4 and len(second.copies) == 3
    assert engine.allocator.num_free() == 39 - 8 - 3
    engine.run()
    assert len({tuple(tokens) for tokens in engine.received.values()}) == 4


def test_children_outlive_their_parent(make_engine):
    for moment in range(4):
        engine = make_engine(budget=10, num_blocks=40)
        for i in range(3):
            engine.add(f"r{i}", [1] * 30, max_tokens=6, parent="r0" if i else None)
        for _ in range(moment):
            engine.turn()
        engine.abort("r0")
        engine.run()
        assert engine.finished == {"r0": "abort", "r1": "length", "r2": "length"}


def test_a_child_may_leave_before_its_parent_has_come_far(make_engine):
    engine = make_engine(budget=10)
    engine.add("parent", [1] * 30, max_tokens=2)
    engine.add("child", [1] * 30, max_tokens=2, parent="parent")
    engine.launch()
    engine.abort("child")
    engine.run()
    assert not engine.scheduler._families and engine.scheduler.num_waiting == 0


def test_a_stranger_is_no_parent(make_engine):
    engine = make_engine(budget=64)
    engine.add("parent", [1] * 20, max_tokens=4)
    engine.launch()
    engine.add("other prompt", [2] * 20, max_tokens=4, parent="parent")
    engine.add("other salt", [1] * 20, max_tokens=4, parent="parent", salt="mine")
    engine.add("gone", [1] * 20, max_tokens=4, parent="nobody")
    step = engine.launch()
    assert [new.num_computed for new in step.new_requests] == [0, 0, 0]
    engine.run()


# ---- what is sent


def test_logprobs_are_sent_with_their_tokens(make_engine):
    engine = make_engine(budget=5)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    engine.add("r", prompt, max_tokens=3, logprobs=0, prompt_logprobs=0)
    engine.add("s", [1], max_tokens=3)
    engine.run()
    mine = [output for output in engine.outputs if output.request_id == "r"]
    assert [output.logprobs[0].token_ids for output in mine] == [[token] for token in engine.received["r"]]
    assert [position.token_ids[0] for position in mine[0].prompt_logprobs] == prompt[1:]
    assert all(output.prompt_logprobs is None for output in mine[1:])
    assert all(output.logprobs is None for output in engine.outputs if output.request_id == "s")


def test_prompt_logprobs_survive_preemption(make_engine):
    engine = make_engine(num_blocks=17, budget=4, watermark=0.0)
    prompt = list(range(20))
    engine.add("old", [1] * 30, max_tokens=30)
    for _ in range(9):
        engine.turn()
    engine.add("r", prompt, max_tokens=5, prompt_logprobs=0)
    engine.run()
    (sent,) = [o.prompt_logprobs for o in engine.outputs if o.request_id == "r" and o.prompt_logprobs is not None]
    assert [position.token_ids[0] for position in sent] == prompt[1:]


def test_the_first_output_tells_of_cache_and_queue(make_engine):
    engine = make_engine(rows=1)
    engine.add("a", [1] * 9, max_tokens=2)
    engine.add("b", [1] * 9, max_tokens=2)
    engine.run()
    first = {o.request_id: o for o in reversed(engine.outputs)}
    assert first["a"].num_cached_tokens == 0 and first["b"].num_cached_tokens == 8
    assert first["b"].queue_ns > first["a"].queue_ns


def test_stats_have_the_promised_names(make_engine):
    engine = make_engine()
    engine.add("a", [1] * 9, max_tokens=4)
    engine.add("b", [1] * 9, max_tokens=4)
    engine.launch()
    stats = engine.scheduler.stats()
    assert stats.keys() <= ENGINE_STATS.keys() and ENGINE_STATS.keys() - stats.keys() == {"plugin_quarantines_total"}
    assert stats["num_requests_running"] == 2 and 0 < stats["kv_cache_usage_perc"] < 1
    engine.run()
    stats = engine.scheduler.stats()
    assert stats["prompt_tokens_total"] == 18 and stats["generation_tokens_total"] == 8
    assert stats["kv_cache_usage_perc"] == 0
