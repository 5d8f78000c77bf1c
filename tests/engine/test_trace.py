"""Every step is traced, and the trace is what Perfetto reads."""

from __future__ import annotations

import json

from quire import LLM, SamplingParams
from quire.core.stats import StepStats
from quire.server.http.trace import make_chrome_trace


def test_steps_tell_their_shape_and_times(llm: LLM) -> None:
    llm.steps.clear()
    llm.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))
    steps = list(llm.steps)
    assert [s.step for s in steps] == sorted(s.step for s in steps)
    assert sum(s.num_tokens for s in steps) >= 3 * (1 + 3)
    assert steps[-1].num_decodes == steps[-1].num_reqs == 3
    for s in steps:
        assert s.device_us > 0
        assert s.end_us >= s.start_us + s.schedule_us + s.launch_us
        assert min(s.schedule_us, s.launch_us, s.wait_us, s.update_us) >= 0
    trace = json.loads(json.dumps(make_chrome_trace(steps)))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == 5 * len(steps)
    assert all(e["dur"] >= 0 and e["ts"] > 0 for e in slices)
    named = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert set(named.values()) == {"schedule", "launch", "device", "wait", "update", "masks"}
    assert {named[e["tid"]] for e in slices} == set(named.values()) - {"masks"}


def test_a_step_that_the_host_saw_late_ends_where_the_next_begins() -> None:
    first = StepStats(
        1, 1, 1, 1, start_us=0.0, schedule_us=1.0, launch_us=1.0, device_us=5.0, wait_us=0.0, end_us=40.0, update_us=1.0
    )
    second = StepStats(
        2,
        1,
        0,
        9,
        start_us=3.0,
        schedule_us=1.0,
        launch_us=30.0,
        device_us=20.0,
        wait_us=0.0,
        end_us=42.0,
        update_us=1.0,
    )
    slices = [e for e in make_chrome_trace([first, second])["traceEvents"] if e.get("cat") == "device"]
    assert {e["name"]: (e["ts"], e["dur"]) for e in slices} == {"step 1": (17.0, 5.0), "step 2": (22.0, 20.0)}
