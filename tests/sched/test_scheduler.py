"""What the scheduler promises, one promise a test."""

import pytest

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.errors import ConfigError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.scheduler import Scheduler
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy


def launch_all(engine, most=100):
    """Launch steps until none can run, and finish them in order; the steps."""
    steps = []
    for _ in range(most):
        step = engine.launch_step()
        if step is not None:
            steps.append(step)
        if not engine.in_flight:
            break
        if step is None or len(engine.in_flight) == 2:
            engine.finish_step()
    return steps


# ---- planning


def test_planning_never_waits_for_a_token(make_engine):
    engine = make_engine(max_in_flight=50)
    engine.add_request("r", [1, 2, 3], max_tokens=20)
    steps = []
    while (step := engine.launch_step()) is not None:
        steps.append(step)
    assert [step.total_num_scheduled_tokens for step in steps] == [3] + [1] * 19
    assert all(step.sampling_mask.all() for step in steps)
    while engine.in_flight:
        engine.finish_step()
    assert engine.finished == {"r": "length"} and len(engine.received["r"]) == 20


def test_prompts_go_in_chunks_after_the_decodes(make_engine):
    engine = make_engine(budget=10)
    engine.add_request("a", [1] * 4, max_tokens=20)
    engine.launch_step()
    engine.add_request("b", [2] * 25, max_tokens=20)
    shapes = []
    for _ in range(4):
        step = engine.launch_step()
        shapes.append((step.num_scheduled_tokens.tolist(), step.sampling_mask.tolist(), step.num_decodes))
        engine.finish_step()
    assert shapes == [
        ([1, 9], [True, False], 1),
        ([1, 9], [True, False], 1),
        ([1, 7], [True, True], 1),
        ([1, 1], [True, True], 2),
    ]


def test_without_chunks_a_prompt_goes_whole_or_waits(make_engine):
    engine = make_engine(budget=64, chunked=False, max_model_len=64, num_blocks=200)
    for i, size in enumerate((40, 30, 20)):
        engine.add_request(f"r{i}", [i] * size, max_tokens=4)
    assert [step.num_scheduled_tokens.tolist()[step.num_decodes :] for step in launch_all(engine)][:3] == [
        [40],
        [30, 20],
        [],
    ]


def test_without_chunks_the_budget_must_hold_the_longest_prompt():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=63 cannot hold.*max_model_len=64.*raise it"):
        make_scheduler(SchedulerConfig(4, 63, chunked_prefill=False), max_model_len=64)


def test_rows_are_stable_and_announced_when_freed(make_engine):
    engine = make_engine(rows=2)
    for i in range(4):
        engine.add_request(f"r{i}", [i], max_tokens=2 + i)
    seen = []
    for step in launch_all(engine):
        seen.append((step.freed_rows, [(new.row, new.request_id) for new in step.new_requests]))
    assert [entry for entry in seen if entry != ([], [])] == [
        ([], [(0, 0), (1, 1)]),
        ([0], [(0, 2)]),
        ([1], [(1, 3)]),
        ([0], []),
    ]


def test_max_seq_len_counts_the_new_tokens(make_engine):
    engine = make_engine()
    engine.add_request("r", [1] * 5, max_tokens=3)
    assert [step.max_seq_len for step in launch_all(engine)] == [5, 6, 7]


def test_cached_prefixes_give_budget_back_within_the_step(make_engine):
    engine = make_engine(budget=20, rows=8, num_blocks=100)
    engine.add_request("first", [1] * 17, max_tokens=1)
    engine.run_until_finished()
    for i in range(4):
        engine.add_request(f"r{i}", [1] * 17, max_tokens=1)
    step = engine.launch_step()
    assert (
        step.num_scheduled_tokens.tolist() == [1] * 4
        and [new.num_computed_tokens for new in step.new_requests] == [16] * 4
    )


def test_generated_tokens_are_found_when_their_request_has_ended(make_engine):
    engine = make_engine(budget=64, max_model_len=64)
    engine.add_request("r", [1, 2, 3], max_tokens=10)
    engine.run_until_finished()
    engine.add_request("next", [1, 2, 3, *engine.received["r"], 5], max_tokens=1)
    engine.run_until_finished()
    assert engine.outputs[-1].num_cached_tokens == 12


# ---- what add_request refuses


def make_scheduler(config=None, *, max_model_len=64, num_blocks=64, groups=(KVGroup(),)):
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
        make_scheduler().add_request(request(1, prompt))
    assert not isinstance(caught.value, QueueFullError)


def test_a_request_that_can_never_fit_is_refused():
    scheduler = make_scheduler(num_blocks=9)
    scheduler.add_request(request(1, [1] * 20, max_tokens=13))
    with pytest.raises(InvalidRequestError, match=r"34 tokens.*9 KV blocks of 4.*has 8.*lower max_tokens"):
        scheduler.add_request(request(2, [1] * 20, max_tokens=14))
    assert scheduler.num_waiting == 1


def test_a_window_needs_fewer_blocks():
    scheduler = make_scheduler(SchedulerConfig(4, 8), num_blocks=9, groups=(KVGroup(window=8),))
    scheduler.add_request(request(1, [1] * 20, max_tokens=40))


def test_a_known_id_is_refused():
    scheduler = make_scheduler(SchedulerConfig(4, 64))
    scheduler.add_request(request(1, [1]))
    with pytest.raises(InvalidRequestError, match="request 1 is in the engine already"):
        scheduler.add_request(request(1, [1]))


def test_a_queue_is_full_only_beyond_the_free_rows():
    scheduler = make_scheduler(SchedulerConfig(4, 64, max_queued=2))
    for i in range(6):  # four for the rows of an idle engine, and two that wait for one
        scheduler.add_request(request(i, [1]))
    message = "2 requests are queued beside 4 that may run, and max_num_queued_requests=2; try again later"
    with pytest.raises(QueueFullError, match=message):
        scheduler.add_request(request(9, [1]))
    scheduler.schedule()
    assert scheduler.num_waiting == 2
    with pytest.raises(QueueFullError, match=message):
        scheduler.add_request(request(9, [1]))
    scheduler.abort_request(0)
    scheduler.add_request(request(9, [1]))


def test_a_row_that_no_step_gave_to_anyone_is_not_named_as_freed():
    rows = RunningBatch(2, 16, has_windows=False, prefix_caching=True)
    first, second = (Request(EngineCoreRequest(i, [1, 2], SamplingParams(seed=0), i), 64) for i in range(2))
    row = rows.add_row(first, 0, 0, 0)
    rows.free_row(first)  # preempted in the step in which it was admitted
    assert rows.take_freed_rows() == []
    assert rows.add_row(first, 0, 0, 0) == row and rows.take_freed_rows() == []
    rows.free_row(first)
    assert rows.add_row(second, 0, 0, 0) == row
    rows.free_row(second)
    assert rows.take_freed_rows() == [row]
