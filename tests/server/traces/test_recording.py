"""``--record``: what a running engine writes, and what it never does to the engine."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from quire import LLM, LoRARequest, SamplingParams
from quire.core.errors import ConfigError
from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.stats import StepStats
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.traces.recorder import TraceRecorder, choose_recording_path
from quire.core.traces.records import SCHEMA_VERSION, ArrivalRecord, EndRecord, HeaderRecord, StepRecord
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.simulate.replay import replay_recording
from quire.server.traces.read import read_trace
from quire.server.traces.recording import open_text, read_recording

SHARED = list(range(3, 3 + 32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama"
    make_tiny_model("llama", path)
    return str(path)


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """The path of a recording of five requests, two of one prompt, and the engine's own account of its steps."""
    path = tmp_path_factory.mktemp("recorded") / "trace.jsonl.zst"
    llm = LLM(model=tiny, device="cpu", max_model_len=256, record=str(path))
    prompts = [[*SHARED, 7, 8], [*SHARED, 9], [5, 6], [40] * 20]
    params = [SamplingParams(max_tokens=4 + i, ignore_eos=True, temperature=0) for i in range(4)]
    llm.generate(prompts, params, priority=[0, 1, 2, 3])
    llm.generate([[*SHARED, 7, 8]], SamplingParams(max_tokens=20, ignore_eos=True, temperature=0))
    steps = list(llm.steps)
    llm.shutdown()
    return path, steps


def test_a_recording_tells_requests_steps_and_outcomes(recorded):
    path, steps = recorded
    recording = read_recording(path)
    assert recording.header.schema == SCHEMA_VERSION
    assert recording.header.policy["name"] == "fcfs" and recording.header.engine["max_num_seqs"] == 256
    arrivals = [r for r in recording.records if isinstance(r, ArrivalRecord)]
    assert [r.prompt_len for r in arrivals] == [34, 33, 2, 20, 34]
    assert [r.max_tokens for r in arrivals] == [4, 5, 6, 7, 20]
    assert [r.priority for r in arrivals] == [0, 1, 2, 3, 0]
    ends = {r.id: r for r in recording.records if isinstance(r, EndRecord)}
    assert [(ends[r.id].reason, ends[r.id].output_len) for r in arrivals] == [("length", n) for n in (4, 5, 6, 7, 20)]
    assert ends[arrivals[-1].id].cached == 32
    finished = recording.list_finished_steps()
    assert [done.step for _, done, _ in finished] == [s.step for s in steps]
    for (step, done, num_reqs), stats in zip(finished, steps, strict=True):
        assert (num_reqs, step.num_decodes) == (stats.num_reqs, stats.num_decodes)
        assert sum(step.tokens or [1] * num_reqs) == stats.num_tokens
        assert done.device_us == pytest.approx(stats.device_us)


def test_the_shape_of_a_step_is_what_its_attention_reads(recorded):
    steps = [r for r in read_recording(recorded[0]).records if isinstance(r, StepRecord) and r.step >= 0]
    first = steps[0]
    assert first.tokens == [34, 33, 2, 20] or sum(first.tokens) == 89
    assert first.prefill_pairs == sum(n * (n + 1) // 2 for n in (34, 33, 2, 20)) and first.context == 0
    assert steps[1].num_decodes == 4 and steps[1].context == 35 + 34 + 3 + 21


def test_equal_prefixes_have_equal_hashes_and_the_text_is_not_there(recorded):
    path, _ = recorded
    trace = read_trace(str(path))
    first, second, short, _, again = (request.block_hashes for request in trace.requests)
    assert first[:2] == second[:2] == again[:2] and short == () and trace.hash_block_size == 16
    assert len(again) == 3 and again[2] != first[-1]  # 34 + 19 tokens in the cache fill three blocks
    assert '"prompt"' not in open_text(path)


def test_prompts_are_recorded_when_asked_for(tiny, tmp_path):
    path = tmp_path / "t.zst"
    llm = LLM(model=tiny, device="cpu", max_model_len=64, record=str(path), record_prompts=True)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.shutdown()
    (arrival,) = [r for r in read_recording(path).records if isinstance(r, ArrivalRecord)]
    assert arrival.prompt == [5, 6, 7]


def test_a_recording_that_was_cut_off_is_read_up_to_there(recorded, tmp_path):
    path, _ = recorded
    whole = read_recording(path).records
    text = open_text(path)
    (tmp_path / "plain").write_text(text[: len(text) // 2])
    assert 5 < len(read_recording(tmp_path / "plain").records) < len(whole)


def test_what_a_killed_server_recorded_can_be_read(tmp_path):
    recorder = make_recorder(tmp_path / "t")
    for number in range(50):
        record_one(recorder, number, 4)
    deadline = time.monotonic() + 60
    while (tmp_path / "t").stat().st_size < 400 and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.copy(tmp_path / "t", tmp_path / "copy")
    recorder.close()
    records, whole = read_recording(tmp_path / "copy").records, read_recording(tmp_path / "t").records
    assert records and records == whole[: len(records)]


def test_no_recording_is_overwritten_and_a_bad_path_is_refused(tmp_path):
    (tmp_path / "a.jsonl.zst").touch()
    (tmp_path / "a.1.jsonl.zst").touch()
    assert choose_recording_path(str(tmp_path / "a.jsonl.zst")).name == "a.2.jsonl.zst"
    with pytest.raises(ConfigError, match="there is no folder"):
        choose_recording_path(str(tmp_path / "missing" / "a"))
    with pytest.raises(ConfigError, match="it is a folder; name a file in it"):
        choose_recording_path(str(tmp_path))
    with pytest.raises(ConfigError, match="it is no regular file"):
        choose_recording_path("/dev/null")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.1.jsonl.zst", "a.jsonl.zst"]
    with pytest.raises(ConfigError, match="--record FILE"):
        LLM(model="quire-tiny", device="cpu", record_prompts=True)


HEADER = HeaderRecord(SCHEMA_VERSION, "", "", 0, "", "", "", {}, {})


def make_recorder(path):
    return TraceRecorder(path, HEADER, block_size=16, prefix_caching=True)


def record_one(recorder, number, num_reqs=256):
    rows, ones = np.arange(num_reqs, dtype=np.int32), np.ones(num_reqs, np.int32)
    step = SchedulerOutput(number, rows, ones, ones > 0, num_reqs, num_reqs, 100, np.full(num_reqs, 100, np.int32))
    stats = StepStats(number, num_reqs, num_reqs, num_reqs, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    output = ModelRunnerOutput(number, ones[:, None], ones)
    start = time.perf_counter()
    recorder.clock()
    recorder.record_step(step, rows.astype(np.int64))
    recorder.record_output(stats, output)
    return time.perf_counter() - start


def test_a_step_is_delayed_by_far_less_than_a_hundredth_of_it(tmp_path):
    recorder = make_recorder(tmp_path / "t")
    seconds = statistics.median(record_one(recorder, number) for number in range(2000))
    recorder.close()
    assert seconds < 34e-6  # 1 % of the step of 256 requests on a 0.6B; measured: 4 us


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux on which no write succeeds")
def test_a_disk_that_fails_ends_the_recording_and_nothing_else(caplog):
    recorder = make_recorder(Path("/dev/full"))
    for number in range(100):
        record_one(recorder, number, 4)
    recorder.close()
    assert ["ends here" in message for message in caplog.messages] == [True]
    record_one(recorder, 101, 4)


def test_every_line_is_json_of_its_own(recorded):
    events = [json.loads(line)["event"] for line in open_text(recorded[0]).splitlines()]
    assert events[0] == "header" and set(events) == {"header", "arrival", "step", "done", "end"}


def test_adapters_are_named_and_share_no_prefix(tmp_path):
    """And whoever reads such a recording is told what it cannot say."""
    path = tmp_path / "t.zst"
    adapters = {"upper": "quire-tiny-upper", "json": "quire-tiny-json"}
    llm = LLM(model="quire-tiny", max_model_len=128, max_num_seqs=4, lora_modules=adapters, record=str(path))
    names = ["upper", "json", None, "upper"]
    requests = [None if name is None else LoRARequest(name) for name in names]
    llm.generate([SHARED] * 4, SamplingParams(max_tokens=3, ignore_eos=True), lora_request=requests)
    llm.shutdown()
    recording = read_recording(path)
    arrivals = [r for r in recording.records if isinstance(r, ArrivalRecord)]
    assert [each.adapter or None for each in arrivals] == names
    upper, as_json, plain, again = (set(each.hashes) for each in arrivals)
    assert upper == again and len(upper | as_json | plain) == 3 * len(upper)
    assert any("3 requests have an adapter" in note for note in recording.make_trace().notes)
    with pytest.raises(ConfigError, match=r"requests have adapters \(json, upper\).* cannot be replayed"):
        list(replay_recording(recording, FCFSPolicy(), FCFSPolicy(), PagedAllocator))
