"""``quire simulate`` on the command line: the same twice, with any policy, and one line for whatever is wrong."""

from __future__ import annotations

import json

import msgspec
import pytest

from quire.server.cli.main import main
from quire.server.simulate.step_model import save_step_model
from quire.server.traces.recording import open_text

TRACE = ["--trace", "synthetic:requests=80,input=fixed/200,output=exponential/30", "--arrivals", "poisson:rate=20"]


@pytest.fixture
def quire(capsys):
    def call(*words):
        status = main(["simulate", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_it_prints_json_that_repeats_by_seed(quire):
    words = (*TRACE, "--policy", "fcfs", "sjf,aging=0", "--slo-ttft-ms", "100", "--json")
    status, out, _ = quire(*words)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["policy"] for line in lines] == ["fcfs", "sjf,aging=0"]
    assert lines[0]["step_model"] == "h200-llama-3.1-8b-bf16" and lines[0]["served"] == 80
    assert 0 <= lines[0]["slo_attainment"] <= 1 and lines[0]["load"]["mean"] > 0
    assert quire(*words)[1] == out
    assert quire(*words, "--seed", "5")[1] != out
    assert quire(*words, "--every-step")[1] == out


def test_it_names_step_model_trace_and_load(quire):
    _, out, _ = quire(*TRACE, "--load", "0.5")
    assert "synthetic: 80 requests" in out and "step model: h200-llama-3.1-8b-bf16: NVIDIA H200" in out
    assert "load: 0.50 of capacity" in out and "time to first token, p99 ms" in out
    assert "do not trust" in quire(*TRACE, "--load", "1.1")[1]


@pytest.mark.parametrize(("count", "arrivals"), [(3, "poisson:rate=1"), (30, "burst")])
def test_a_load_that_cannot_be_measured_is_not_made_up(quire, count, arrivals):
    _, out, _ = quire("--trace", f"synthetic:requests={count},output=fixed/2", "--arrivals", arrivals)
    assert "load: not measured" in out and "inf" not in out and "nan" not in out


def test_steps_beyond_the_step_model_are_told(quire, model, tmp_path):
    """A model fitted to light traffic, and a trace that fills the engine."""
    few = msgspec.structs.replace(model, decodes=(1, 4), decodes_us=(4000.0, 4050.0))
    save_step_model(few, tmp_path / "few.json")
    burst = ("--trace", "synthetic:requests=32,input=fixed/64,output=fixed/64", "--arrivals", "burst")
    _, out, _ = quire(*burst, "--step-model", str(tmp_path / "few.json"))
    assert "larger than any of the step model (4 decodes or 2048 tokens)" in out
    (line,) = quire(*burst, "--step-model", str(tmp_path / "few.json"), "--json")[1].splitlines()
    assert json.loads(line)["unknown_step_share"] > 0.5
    assert "larger than any" not in quire(*burst)[1]


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "prefix_aware,min_imbalance=2"])
def test_replicas_stand_behind_a_router(quire, router):
    status, out, _ = quire(*TRACE, "--replicas", "3", "--router", router, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["served"] == 80 and figures["router"] == router


def test_a_policy_of_ones_own_is_named_by_module_and_class(quire, tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(
        "from quire.sdk import BatchingPolicy\n"
        "class NewestFirst(BatchingPolicy):\n"
        "    def admission_key(self, request):\n"
        "        return (-request.arrival_ns,)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, out, _ = quire(*TRACE, "--policy", "my_policy:NewestFirst", "--json")
    assert status == 0 and json.loads(out)["served"] == 80


def test_fit_and_replay_take_what_was_recorded(quire, tmp_path):
    recording, model = str(tmp_path / "t.jsonl.zst"), str(tmp_path / "m.json")
    mixed = ["--trace", "synthetic:requests=80,input=lognormal/600/1,output=exponential/80", "--arrivals", "burst"]
    assert quire(*mixed, "--record", recording)[0] == 0
    status, out, _ = quire("replay", recording)
    assert status == 0 and "fcfs planned all" in out
    status, out, _ = quire("replay", recording, "--policy", "sjf,aging=0")
    assert status == 1 and "then sjf plans something else" in out
    status, out, _ = quire("fit", recording, "--out", model, "--test", recording)
    assert status == 0 and "median error 0." in out
    assert quire("--trace", recording, "--step-model", model, "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--trace is missing"),
        (["--trace", "no-such-file"], "there is no such file"),
        (["--trace", "synthetic:requests=5"], "has no times; give them with --arrivals"),
        ([*TRACE, "--policy", "fcsf"], "did you mean fcfs"),
        ([*TRACE, "--policy", "sjf,ageing=1"], "did you mean aging"),
        ([*TRACE, "--policy", "sjf,aging"], "there is no '='"),
        ([*TRACE, "--step-model", "h200-llama"], "did you mean"),
        ([*TRACE, "--router", "nearest", "--replicas", "2"], "is not known"),
        ([*TRACE, "--replicas", "0"], "at least 1"),
        ([*TRACE, "--load", "70"], "share of the capacity"),
        (["--trace", "synthetic:requests=5", "--load", "0.5"], "with fewer than 20 requests"),
        (["--trace", "synthetic:requests=5", "--arrivals", "burst", "--load", "0.5"], "come one after another"),
        ([*TRACE, "--max-num-batched-tokens", "8"], "raise the one or lower the other"),
        ([*TRACE, "--num-gpu-blocks-override", "1"], "too small"),
        ([*TRACE, "--record", "x.zst", "--replicas", "2"], "records one engine"),
        (["replay", "no-such-file"], "; name a recording"),
        (["fit", "no-such-file", "--out", "x"], "; name a recording"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(quire, words, says):
    status, _, err = quire(*words)
    assert status == 2 and says in err and err.count("\n") == 1


def test_a_foreign_trace_is_no_recording(quire, tmp_path):
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n")
    status, _, err = quire("replay", str(tmp_path / "t.csv"))
    assert status == 2 and "line 1 is not one of a recording" in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header, arrival: header["engine"].pop("max_model_len"), "is not as an engine records"),
        (lambda header, arrival: header["engine"].update(block_size="x"), "is not as an engine records"),
        (lambda header, arrival: header["policy"].update(options=3), "is not as an engine records"),
        (lambda header, arrival: header["policy"].pop("target"), "is not as an engine records"),
        (lambda header, arrival: arrival.update(scheduling={"deadline_ms": "soon"}), "record it again"),
        (lambda header, arrival: arrival.update(prompt_len=-5), "record it again"),
    ],
)
def test_a_recording_with_impossible_numbers_is_refused_in_one_line(quire, tmp_path, change, says):
    path, changed = tmp_path / "t.zst", tmp_path / "changed.jsonl"
    quire(*TRACE, "--record", str(path))
    lines = [json.loads(line) for line in open_text(path).splitlines()]
    change(lines[0], next(line for line in lines if line["event"] == "arrival"))
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    failures = []
    for words in (["replay", str(changed)], ["--trace", str(changed), "--no-capacity"]):
        status, _, err = quire(*words)
        if status:
            failures.append(err)
            assert status in (1, 2) and err.count("\n") <= 1 and "Traceback" not in err
    assert any(says in err or "mend or remove it" in err for err in failures)


def test_requests_that_do_not_fit_are_told(quire):
    _, out, _ = quire("--trace", "synthetic:requests=4,input=fixed/3000,output=fixed/4", "--arrivals", "burst",
                      "--max-model-len", "2048", "--no-capacity")  # fmt: skip
    assert "4 requests were not served, the first because the prompt has 3000 tokens" in out
