"""How requests end, and what is sent for them."""

import pytest

from quire.core.stats import ENGINE_STATS
from quire.core.testing.fake_kv_worker import compute_expected_tokens

# ---- how requests end


def test_a_stop_token_ends_and_the_token_after_it_is_dropped(make_engine):
    sampled = compute_expected_tokens(0, [1, 2], 8, 50)
    engine = make_engine()
    engine.add_request("eos", [1, 2], max_tokens=8, seed=0, eos=[sampled[3]])
    engine.add_request("stop", [1, 2], max_tokens=8, seed=0, stop_token_ids=[sampled[3]])
    engine.add_request("ignored", [1, 2], max_tokens=8, seed=0, eos=[sampled[3]], ignore_eos=True)
    engine.add_request("later", [1, 2], max_tokens=8, seed=0, eos=[sampled[3]], min_tokens=5)
    engine.run_until_finished()
    names = list(engine.numbers)
    ends = {names[o.request_id]: (o.finish_reason, o.stop_reason) for o in engine.outputs if o.finish_reason}
    assert ends == {
        "eos": ("stop", None),
        "stop": ("stop", sampled[3]),
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
            assert engine.allocator.debug_state().tables.keys() <= {engine.numbers["b"]}
        engine.run_until_finished()
        assert engine.finished["b"] == "length" and engine.allocator.num_free_blocks() == 19
    assert not engine.scheduler.abort_request(engine.numbers["a"])


def test_a_failed_step_ends_its_own_requests_only(make_engine):
    engine = make_engine(rows=2)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 9, max_tokens=3)
    engine.launch_failing_step()
    engine.launch_step()
    ended = engine.finish_step()
    assert [(o.request_id, o.finish_reason, o.error) for o in ended] == [
        (engine.numbers["r0"], "error", "the worker failed"),
        (engine.numbers["r1"], "error", "the worker failed"),
    ]
    assert engine.allocator.stats().num_cached == 0, "what a failed step wrote must not be found"
    engine.run_until_finished()
    assert engine.finished == {"r0": "error", "r1": "error", "r2": "length"}
    assert engine.allocator.num_free_blocks() == 63


@pytest.mark.parametrize("read_differences", [True, False])
@pytest.mark.parametrize("num_aborted", [0, 1])
def test_a_prompt_that_failed_is_not_found_through_its_children(make_engine, read_differences, num_aborted):
    """With n = 3, the children share blocks that were granted and never computed."""
    engine = make_engine()
    prompt = list(range(18))
    for i in range(3):
        engine.add_request(f"r{i}", prompt, parent="r0" if i else None, max_tokens=8)
    engine.launch_failing_step(read_differences=read_differences)
    engine.launch_step()
    assert engine.scheduler.num_running == 3, "the children share the prompt before it is known to have failed"
    for i in range(num_aborted):
        engine.abort_request(f"r{i}")
    engine.finish_step()
    assert engine.finished == {f"r{i}": "abort" if i < num_aborted else "error" for i in range(3)}
    assert engine.allocator.stats().num_cached == 0
    engine.add_request("again", prompt, max_tokens=8)
    engine.run_until_finished()
    assert engine.outputs[-8].num_cached_tokens == 0 and engine.finished["again"] == "length"


def test_children_of_a_computed_prompt_outlive_a_later_step_of_their_parent(make_engine):
    engine = make_engine(rows=2)
    for i in range(3):
        engine.add_request(f"r{i}", [1, 2, 3, 4, 5], parent="r0" if i else None, max_tokens=4)
    engine.run_step()
    engine.finish_step()
    engine.launch_failing_step()  # r0 decodes, r1 is admitted
    engine.finish_step()
    engine.run_until_finished()
    assert engine.finished == {"r0": "error", "r1": "error", "r2": "length"}


@pytest.mark.parametrize("read_differences", [True, False])
def test_a_step_out_of_memory_leaves_no_trace_of_its_grants(make_engine, read_differences):
    engine = make_engine(rows=2)
    engine.add_request("a", [9] * 8, max_tokens=1)
    engine.add_request("b", [8] * 8, max_tokens=30)
    engine.launch_step()
    engine.finish_step()  # "a" ends: the next step names its row as freed
    engine.add_request("c", [9] * 12, max_tokens=3)
    assert engine.launch_step_out_of_memory(read_differences=read_differences)
    engine.add_request("d", [7] * 8, max_tokens=3)
    engine.run_until_finished()
    assert engine.finished == dict.fromkeys("abcd", "length")
    cached = {output.request_id: output.num_cached_tokens for output in engine.outputs if output.num_cached_tokens}
    assert cached == {engine.numbers["c"]: 8}, "what counts as cached is of the grant that was computed"


# ---- what is sent


def test_logprobs_are_sent_with_their_tokens(make_engine):
    engine = make_engine(budget=5)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    engine.add_request("r", prompt, max_tokens=3, logprobs=0, prompt_logprobs=0)
    engine.add_request("s", [1], max_tokens=3)
    engine.run_until_finished()
    outputs = [output for output in engine.outputs if output.request_id == engine.numbers["r"]]
    assert [output.logprobs[0].token_ids for output in outputs] == [[token] for token in engine.received["r"]]
    assert [position.token_ids[0] for position in outputs[0].prompt_logprobs] == prompt[1:]
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert all(output.logprobs is None for output in engine.outputs if output.request_id == engine.numbers["s"])


def test_prompt_logprobs_survive_preemption(make_engine):
    engine = make_engine(num_blocks=17, budget=4, watermark=0.0)
    prompt = list(range(20))
    engine.add_request("old", [1] * 30, max_tokens=30)
    for _ in range(9):
        engine.run_step()
    engine.add_request("r", prompt, max_tokens=5, prompt_logprobs=0)
    engine.run_until_finished()
    number = engine.numbers["r"]
    (sent,) = [o.prompt_logprobs for o in engine.outputs if o.request_id == number and o.prompt_logprobs is not None]
    assert [position.token_ids[0] for position in sent] == prompt[1:]


def test_the_first_output_tells_of_cache_and_queue(make_engine):
    engine = make_engine(rows=1)
    engine.add_request("a", [1] * 9, max_tokens=2)
    engine.add_request("b", [1] * 9, max_tokens=2)
    engine.run_until_finished()
    names = list(engine.numbers)
    first = {names[o.request_id]: o for o in reversed(engine.outputs)}
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
