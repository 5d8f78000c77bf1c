"""Why a request waited, as the log of the scheduler tells it."""

from quire.core.sched.request_log import RequestLog
from quire.plugins.sched.priority import PriorityPolicy


def explain(engine, name):
    (explained,) = engine.scheduler.policy_runner.explain_requests(name)
    return explained


def test_it_says_what_was_missing(make_engine):
    engine = make_engine(rows=2, num_blocks=200)
    for i in range(3):
        engine.add_request(f"r{i}", [i] * 8, max_tokens=20)
    engine.run_until_finished()
    first, last = explain(engine, "r0"), explain(engine, "r2")
    assert first["state"] == "length" and first["num_output_tokens"] == 20 and first["prompt_len"] == 8
    assert sum(first["waited_ms"].values()) <= 2
    assert last["waited_ms"]["rows"] >= 15 and last["waited_ms"]["blocks"] == last["waited_ms"]["tokens"] == 0
    (run,) = last["runs"]
    assert run["admitted_ms"] >= 15 and run["grants"][0] == {
        "first_step": run["first_step"],
        "num_steps": 1,
        "num_tokens": 8,
    }
    assert run["grants"][1]["num_tokens"] == 1 and run["grants"][1]["num_steps"] >= 19


def test_it_tells_blocks_budget_and_policy_apart(make_engine):
    engine = make_engine(num_blocks=17, watermark=0.0, budget=16)
    engine.add_request("long", [1] * 40, max_tokens=20)
    engine.run_step()
    engine.add_request("next", [2] * 30, max_tokens=2)
    engine.run_until_finished()
    waited = explain(engine, "next")["waited_ms"]
    assert waited["tokens"] >= 1, "the first prompt takes the whole budget of its steps"
    assert waited["blocks"] >= 5 and waited["rows"] == 0, "then there are too few blocks"
    grants = explain(engine, "long")["runs"][0]["grants"]
    assert [each["num_tokens"] for each in grants][:3] == [16, 8, 1], "two whole chunks, and the rest"


def test_it_names_preemptions_and_what_waits_now(make_engine):
    engine = make_engine(PriorityPolicy(), num_blocks=13, watermark=0.0)
    for name, priority in (("lazy", 1), ("laziest", 2), ("urgent", -1)):
        engine.add_request(name, [priority + 2] * 8, max_tokens=17, priority=priority)
        engine.run_step()
    while engine.scheduler.stats()["num_preemptions_total"] == 0:
        engine.run_step()
    engine.run_step()
    waiting = explain(engine, "laziest")
    assert waiting["state"] == "waiting" and waiting["num_preemptions"] == 1
    assert waiting["runs"][0]["left_ms"] is not None
    assert waiting["policy"].endswith("PriorityPolicy") and "(12000" in waiting["admission_key"]
    engine.run_until_finished()
    assert len(explain(engine, "laziest")["runs"]) == 2


def test_its_size_is_fixed(make_engine):
    log = RequestLog(max_requests=10, max_steps=20)
    engine = make_engine()
    engine.scheduler.policy_runner.log = log
    for i in range(50):
        engine.add_request(f"r{i}", [1] * 4, max_tokens=3)
    engine.run_until_finished()
    assert len(log) == 10
    assert log.find_requests("r49") and not log.find_requests("r0")
    assert explain(engine, "r49")["state"] == "length"


def test_an_http_request_is_found_by_its_id(make_engine):
    engine = make_engine()
    engine.add_request("abc-1f2e3d4c-0", [1], max_tokens=1)
    engine.add_request("abcd-1f2e3d4c-0", [1], max_tokens=1)
    engine.run_until_finished()
    for name in ("abc-1f2e3d4c-0", "abc", "chatcmpl-abc", "cmpl-abc"):
        assert explain(engine, name)["request_id"] == "abc-1f2e3d4c-0"
    assert engine.scheduler.policy_runner.explain_requests("ab") == []
