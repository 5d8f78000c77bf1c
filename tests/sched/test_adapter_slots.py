"""Which adapters have slots: who waits, who goes on, and that no request ever meets another's weights."""

import itertools

import pytest

from quire.core.adapters import AdapterRef
from quire.plugins.sched.priority import PriorityPolicy

PROMPT = [1, 2, 3, 4, 5]
_ids = itertools.count(1)


def make_adapter(name, content=None):
    return AdapterRef(next(_ids), name, f"/{name}", content or f"{name}-{next(_ids)}")


def get_slots(engine):
    return engine.scheduler.adapter_slots


def test_a_request_of_an_adapter_gets_the_adapters_tokens(make_engine):
    engine = make_engine(max_loras=2)
    a, b = make_adapter("a"), make_adapter("b")
    for name, adapter in (("base", None), ("a", a), ("b", b), ("a2", a)):
        engine.add_request(name, PROMPT, adapter=adapter, seed=1, max_tokens=6)
    engine.run_until_finished()
    assert engine.received["a"] == engine.received["a2"] != engine.received["b"] != engine.received["base"]
    assert get_slots(engine).num_loads == 2


def test_only_the_requests_of_the_adapter_without_a_slot_wait(make_engine):
    engine = make_engine(max_loras=1)
    a, b = make_adapter("a"), make_adapter("b")
    engine.add_request("a", PROMPT, adapter=a, max_tokens=12)
    engine.run_step()
    engine.add_request("b", PROMPT, adapter=b, max_tokens=2)
    for name, adapter in (("base", None), ("a2", a)):
        engine.add_request(name, PROMPT, adapter=adapter, max_tokens=3)
    engine.run_step()
    engine.run_step()
    running = {request.external_request_id for request in engine.scheduler.debug_state().running.requests if request}
    assert running == {"a", "base", "a2"}
    assert engine.scheduler.stats()["lora_requests_waiting_for_slot"] == 1
    assert [(each.name, each.num_running, each.num_waiting) for each in get_slots(engine).list_activity()] == [
        ("a", 2, 0),
        ("b", 0, 1),
    ]
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"}


def test_hundreds_that_wait_for_an_adapter_hide_nobody_behind_them(make_engine):
    engine = make_engine(max_loras=1, num_blocks=256)
    engine.add_request("a", PROMPT, adapter=make_adapter("a"), max_tokens=40)
    engine.run_step()
    b = make_adapter("b")
    for index in range(600):
        engine.add_request(f"b{index}", PROMPT, adapter=b, max_tokens=1)
    engine.add_request("base", PROMPT, max_tokens=1)
    for _ in range(4):
        engine.run_step()
    assert engine.finished == {"base": "length"}


def test_others_go_on_while_an_adapter_is_read(make_engine):
    engine = make_engine(max_loras=2, staging_turns=10)
    engine.add_request("a", PROMPT, adapter=make_adapter("a"), max_tokens=2)
    engine.add_request("base", PROMPT, max_tokens=4)
    for _ in range(9):
        engine.run_step()
    assert engine.finished == {"base": "length"}
    assert engine.scheduler.stats()["lora_requests_waiting_for_load"] == 1
    engine.run_until_finished()
    assert engine.finished["a"] == "length"


def test_waiting_too_long_makes_another_adapter_give_up_its_slot(make_engine):
    """Requests of ``a`` keep coming, and would keep the slot for ever. A turn is a millisecond, the bound a second."""
    engine = make_engine(max_loras=1)
    a, b = make_adapter("a"), make_adapter("b")
    engine.add_request("b", PROMPT, adapter=b, max_tokens=2, arrival_ns=0)
    engine.run_step()
    engine.add_request("late", PROMPT, adapter=a, max_tokens=2)
    for turn in range(1100):
        if turn % 2 == 0:
            engine.add_request(f"b{turn}", PROMPT, adapter=b, max_tokens=4)
        engine.run_step()
        if "late" in engine.finished:
            break
    assert 1000 <= turn <= 1020
    assert len(engine.finished) > 450, "those of the other adapter went on until then"
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"}


def test_a_slot_is_given_away_only_after_the_last_step_that_names_it(make_engine):
    engine = make_engine(max_loras=1, max_in_flight=2)
    a, b = make_adapter("a"), make_adapter("b")
    engine.add_request("a", PROMPT, adapter=a, max_tokens=9)
    engine.launch_step()
    engine.launch_step()
    engine.add_request("b", PROMPT, adapter=b, max_tokens=1)
    engine.abort_request("a")
    engine.finish_step()
    engine.launch_step()
    assert engine.worker.loaded_adapters == {0: a.content_hash}, "a step that names the slot is in flight"
    engine.finish_step()
    engine.launch_step()
    assert engine.worker.loaded_adapters == {0: b.content_hash}
    engine.run_until_finished()
    assert engine.finished == {"a": "abort", "b": "length"}


def test_a_preempted_request_keeps_its_slot(make_engine):
    """Too few blocks: requests preempt each other again and again, and a third adapter wants a slot all the while."""
    engine = make_engine(max_loras=2, num_blocks=17, rows=4)
    a, b, c = (make_adapter(name) for name in "abc")
    for index, adapter in enumerate((a, b, a, b, c)):
        engine.add_request(f"r{index}", [index] * 10, adapter=adapter, max_tokens=30)
    engine.run_until_finished()
    assert engine.scheduler.stats()["num_preemptions_total"] > 0
    assert set(engine.finished.values()) == {"length"}


def test_a_reload_answers_new_requests_with_new_weights_and_the_old_with_the_old(make_engine):
    engine = make_engine(max_loras=2)
    old, new = make_adapter("a", "old"), make_adapter("a", "new")
    engine.add_request("old", PROMPT, adapter=old, seed=1, max_tokens=9)
    engine.run_step()
    get_slots(engine).retire_adapter(old.adapter_id)
    engine.add_request("new", PROMPT, adapter=new, seed=1, max_tokens=9)
    engine.run_until_finished()
    assert engine.received["old"] != engine.received["new"]
    engine.add_request("again", PROMPT, adapter=new, seed=1, max_tokens=9)
    engine.run_until_finished()
    assert engine.worker.loaded_adapters == {1: "new"}, "the old one's slot was cleared"


@pytest.mark.parametrize("same_content", [True, False])
def test_a_prefix_is_shared_by_content_and_never_across_it(make_engine, same_content):
    engine = make_engine(max_loras=2)
    prompt = list(range(16))
    first, second = make_adapter("a", "x"), make_adapter("a", "x" if same_content else "y")
    engine.add_request("first", prompt, adapter=first, max_tokens=1)
    engine.run_until_finished()
    engine.add_request("base", prompt, max_tokens=1)
    engine.add_request("second", prompt, adapter=second, max_tokens=1)
    engine.run_until_finished()
    cached = {engine.outputs[i].request_id: engine.outputs[i].num_cached_tokens for i in range(3)}
    assert cached[engine.numbers["base"]] == 0
    assert (cached[engine.numbers["second"]] > 0) == same_content


def test_the_completions_of_one_prompt_share_it_and_the_adapter(make_engine):
    engine = make_engine(max_loras=1)
    a = make_adapter("a")
    engine.add_request("first", PROMPT * 2, adapter=a, max_tokens=5)
    for index in range(3):
        engine.add_request(f"child{index}", PROMPT * 2, adapter=a, parent="first", max_tokens=5)
    other = make_adapter("b")
    engine.add_request("other", PROMPT * 2, adapter=other, parent="first", max_tokens=5)
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"}


def test_a_free_slot_goes_to_the_first_by_the_policys_order(make_engine):
    engine = make_engine(PriorityPolicy(), max_loras=1)
    engine.add_request("a", PROMPT, adapter=make_adapter("a"), max_tokens=8)
    engine.run_step()
    for name, priority in (("low", 5), ("high", -5), ("mid", 0)):
        engine.add_request(name, PROMPT, adapter=make_adapter(name), priority=priority, max_tokens=1)
    engine.run_until_finished()
    assert list(engine.finished) == ["a", "high", "mid", "low"]


def test_the_slot_of_the_adapter_used_last_is_given_away_last(make_engine):
    engine = make_engine(max_loras=2)
    a, b, c = (make_adapter(name) for name in "abc")
    for name, adapter in (("a", a), ("b", b), ("a2", a), ("c", c)):
        engine.add_request(name, PROMPT, adapter=adapter, max_tokens=1)
        engine.run_until_finished()
    assert set(engine.worker.loaded_adapters.values()) == {a.content_hash, c.content_hash}
    assert get_slots(engine).num_loads == 3


def test_explain_says_that_a_request_waited_for_its_adapter(make_engine):
    engine = make_engine(max_loras=1, staging_turns=7)
    engine.add_request("a", PROMPT, adapter=make_adapter("json"), max_tokens=1)
    for _ in range(5):
        engine.run_step()
    [waiting] = engine.scheduler.policy_runner.explain_requests("a")
    assert (waiting["state"], waiting["adapter"]) == ("waiting", "json")
    assert waiting["waited_ms"]["adapter"] == pytest.approx(5, abs=1.5)
    engine.run_until_finished()
    [finished] = engine.scheduler.policy_runner.explain_requests("a")
    assert finished["waited_ms"]["adapter"] == pytest.approx(8, abs=1.5)


def test_requests_whose_adapter_cannot_be_read_end_and_no_others(make_engine):
    engine = make_engine(max_loras=1, staging_turns=10_000)
    bad = make_adapter("bad")
    for name in ("x", "y"):
        engine.add_request(name, PROMPT, adapter=bad, max_tokens=2)
    engine.add_request("base", PROMPT, max_tokens=2)
    engine.run_step()
    for request in get_slots(engine).take_requests(bad.adapter_id):
        engine.scheduler.failed_outputs.append(engine.scheduler.end_with_error(request, "unreadable"))
    engine.run_until_finished()
    assert engine.finished == {"x": "error", "y": "error", "base": "length"}
    assert not get_slots(engine).has_pending
