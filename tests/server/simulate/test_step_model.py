"""Step models: fitted to recorded steps they give back what was planted; files are checked; those shipped are sane."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from quire.core.errors import ConfigError
from quire.core.worker.cuda_graphs.capture_sizes import choose_capture_sizes
from quire.server.bench.steps import list_grid_points
from quire.server.cli.main import main
from quire.server.simulate.fit import fit_step_model, measure_errors
from quire.server.simulate.flags import DEFAULT_MODEL
from quire.server.simulate.simulation import run_simulation
from quire.server.simulate.step_model import (
    StepShape,
    list_shipped_models,
    load_step_model,
    save_step_model,
)
from quire.server.traces.recording import read_recording


@pytest.fixture
def root():
    return Path(__file__).resolve().parents[3]


def record(trace, setup, path, noise=0.0):
    """Simulate, and read the recording with noisy step times."""
    run_simulation(trace, setup, record_to=path)
    recording = read_recording(path)
    rng = np.random.default_rng(0)
    for record in recording.records:
        if hasattr(record, "device_us"):
            record.device_us *= 1 + noise * rng.standard_normal()
    return recording


def test_a_fit_finds_the_planted_model(make_setup, make_trace, tmp_path, model):
    recording = record(make_trace(count=400, rate=12.0), make_setup(), tmp_path / "t", noise=0.02)
    other = record(make_trace(count=200, rate=20.0, seed=5), make_setup(), tmp_path / "u")
    fitted = fit_step_model([recording], "fitted", "a test")
    report = measure_errors(fitted, [other])
    assert report.median_error < 0.01 and report.p95_error < 0.03 and abs(report.bias) < 0.01
    assert fitted.context_us == pytest.approx(model.context_us, rel=0.15)
    assert fitted.host.arrival_us == pytest.approx(model.host.arrival_us, rel=0.3)
    assert fitted.host.gap_us == pytest.approx(model.host.gap_us, abs=2)
    assert fitted.limits == msgspec.structs.replace(model.limits)
    # What is predicted with it is what would have been.
    trace = make_trace(count=300, rate=16.0, seed=9)
    real, predicted = (run_simulation(trace, make_setup(model=each)).summarize() for each in (model, fitted))
    for figure in ("e2e_p50_ms", "ttft_p50_ms", "ttft_p99_ms", "output_tokens_per_s"):
        assert predicted[figure] == pytest.approx(real[figure], rel=0.05), figure


def test_a_fit_finds_graphs_of_decodes_and_slow_launches(make_setup, make_trace, tmp_path, padded_model):
    setup = make_setup(model=padded_model)
    recording = record(make_trace(count=500, rate=14.0), setup, tmp_path / "t", noise=0.02)
    other = record(make_trace(count=200, rate=16.0, seed=5), setup, tmp_path / "u")
    fitted = fit_step_model([recording], "fitted", "a test")
    report = measure_errors(fitted, [other])
    assert report.median_error < 0.01 and report.p95_error < 0.03 and abs(report.bias) < 0.005
    assert fitted.pads_decodes and fitted.decodes == padded_model.decodes
    assert fitted.device_ns(StepShape(5, 5, 4000, 0, 5)) > fitted.device_ns(StepShape(9, 9, 4000, 0, 9))
    launches = [fitted.host_ns(8, tokens).launch_ns / 1e6 for tokens in (32, 1024)]
    assert launches == pytest.approx([2.0, 9.0], rel=0.3)
    assert fitted.host.lead_us < 1000


def test_outliers_do_not_move_a_fit(make_setup, make_trace, tmp_path, model):
    recording = record(make_trace(count=400, rate=12.0), make_setup(), tmp_path / "t")
    clean = fit_step_model([recording], "clean", "a test")
    done = [record for record in recording.records if hasattr(record, "device_us")]
    for each in done[::50]:
        each.device_us *= 20
    spoilt = fit_step_model([recording], "spoilt", "a test")
    shape = StepShape(20, 20, 8000, 0, 20)
    assert spoilt.device_ns(shape) == pytest.approx(clean.device_ns(shape), rel=0.02)


def test_too_few_steps_are_refused(make_setup, make_trace, tmp_path):
    recording = record(make_trace(count=2, rate=1.0, output="fixed/5"), make_setup(), tmp_path / "t")
    with pytest.raises(ConfigError, match="too few for a fit"):
        fit_step_model([recording], "x", "y")


def test_recordings_of_two_models_are_refused(make_setup, make_trace, tmp_path):
    both = [record(make_trace(count=40), make_setup(), tmp_path / name) for name in "ab"]
    both[1].header.model = "another"
    with pytest.raises(ConfigError, match="fit one model at a time"):
        fit_step_model(both, "x", "y")


def test_launches_that_waited_for_the_step_before_do_not_count(make_setup, make_trace, tmp_path):
    recording = record(make_trace(count=400, rate=3.0), make_setup(), tmp_path / "t")
    usual = fit_step_model([recording], "m", "").host.prompt_launch_us
    last_end_us = 0.0
    for number, (step, done, num_reqs) in enumerate(recording.list_finished_steps()):
        if step.num_decodes < num_reqs and done.start_us + done.schedule_us < last_end_us and number % 5 == 0:
            done.launch_us = 300_000.0
        last_end_us = done.end_us
    assert max(done.launch_us for _, done, _ in recording.list_finished_steps()) == 300_000
    assert fit_step_model([recording], "m", "").host.prompt_launch_us == pytest.approx(usual, rel=0.1)


@pytest.mark.parametrize("name", list_shipped_models())
def test_a_shipped_model_says_what_it_is_and_grows_with_its_work(name):
    model = load_step_model(name)
    assert model.name == name and "H200" in model.device and len(model.source) > 20
    times = [model.device_ns(StepShape(1, n, 0, 0, int(n == 1))) for n in range(1, 9000, 37)]
    assert times == sorted(times) and times[0] > 100_000
    contexts = [1000, 50_000]
    expected = [model.device_ns(StepShape(8, 8, context, 0, 8)) for context in contexts]
    assert model.decode_ns(8, np.array(contexts)).tolist() == expected


def test_shipped_models_tell_batches_that_were_measured_by_themselves(root):
    """Those of docs/performance.md, at their mean context of 256."""
    table = (root / "docs" / "performance.md").read_text()
    assert DEFAULT_MODEL in list_shipped_models()
    rows = {
        "h200-llama-3.1-8b-bf16": ("Llama-3.1-8B, bf16", (1, 32, 256)),
        "h200-llama-3.1-8b-fp8": ("Llama-3.1-8B, FP8 weights and KV cache", (1, 32, 256)),
        "h200-llama-3.1-8b-awq": ("Llama-3.1-8B, AWQ int4", (1, 8, 32, 64)),
        "h200-qwen3-0.6b-bf16": ("Qwen3-0.6B, bf16", (1, 32, 256)),
    }
    assert sorted(rows) == list_shipped_models()
    for name, (title, batches) in rows.items():
        model = load_step_model(name)
        text = table[table.index(f"| {title} |") :]
        for batch in batches:
            rate = float(re.search(rf"batch {batch} \| \*\*([\d,]+)\*\*", text)[1].replace(",", ""))
            step = model.device_ns(StepShape(batch, batch, 256 * batch, 0, batch)) / 1e9
            assert batch / step == pytest.approx(rate, rel=0.05), (name, batch)


def test_a_file_is_written_and_read(model, tmp_path):
    save_step_model(model, tmp_path / "m.json")
    assert load_step_model(str(tmp_path / "m.json")) == model
    with pytest.raises(ConfigError, match="can be written"):
        save_step_model(model, tmp_path / "missing" / "m.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": [1]}, "two or more"),
        ({"tokens": [4, 2, 3, 5]}, "must ascend"),
        ({"context_us": -1.0}, "negative"),
        ({"decodes": [1, 2], "decodes_us": [1.0]}, "decodes and decodes_us need the same number"),
        ({"schema": 2}, "schema 2"),
        ({"context_us": "fast"}, "not a step model"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(model, tmp_path, change, says):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**msgspec.to_builtins(model), **change}))
    with pytest.raises(ConfigError, match=says) as caught:
        load_step_model(str(path))
    assert "\n" not in str(caught.value)


def test_the_grid_fits_the_engine():
    for seqs, tokens, length, slots in ((256, 8192, 131072, 800_000), (8, 512, 256, 2000), (1, 16, 32, 64)):
        points = list_grid_points(seqs, tokens, length, slots)
        assert points
        for point in points:
            num_reqs, longest = len(point.output_lens), max(point.output_lens)
            assert num_reqs <= seqs and point.prompt_len + longest <= length
            assert num_reqs * point.prompt_len + sum(point.output_lens) <= slots
    with pytest.raises(ConfigError, match="no step of the grid"):
        list_grid_points(1, 1, 4, 4)


def test_the_grid_holds_decodes_of_every_graph_size():
    point = list_grid_points(256, 8192, 131072, 800_000)[0]
    in_steps = Counter(sum(length > step for length in point.output_lens) for step in range(max(point.output_lens)))
    assert all(in_steps[size] >= 5 for size in choose_capture_sizes(256)), in_steps


def test_bench_steps_times_a_grid_until_a_fit_has_enough(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    small = ["--max-num-seqs", "4", "--max-model-len", "128", "--num-gpu-blocks-override", "64"]
    assert main(["bench", "steps", "quire-tiny", "--out", str(out), "--seconds", "0.1", *small, "--json"]) == 0
    fit = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fit["num_steps"] >= 200
    model = load_step_model(str(out))
    assert model.limits.max_num_seqs == 4 and model.tokens_us[0] > 0
    assert main(["bench", "steps", "quire-tiny", "--out", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_accuracy_is_measured_as_zero_where_the_server_was_the_simulator(
    make_setup, make_trace, tmp_path, root, monkeypatch, capsys
):
    for seed, name in enumerate(("first", "second")):
        trace = make_trace(count=100, rate=12.0, seed=seed)
        times = run_simulation(trace, make_setup(), record_to=tmp_path / f"{name}.jsonl.zst").times
        columns = {each: getattr(times, each).tolist() for each in ("arrival_s", "ttft_s", "e2e_s", "output_len")}
        (tmp_path / f"{name}.json").write_text(json.dumps(columns))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["simulator_accuracy", "compare", "--fit", "first", "--predict", "second"])
    runpy.run_path(str(root / "benchmarks" / "simulator_accuracy.py"), run_name="__main__")
    errors = re.findall(r"([+-]\d+\.\d)%", out := capsys.readouterr().out)
    assert len(errors) == 10 and all(abs(float(error)) < 2 for error in errors), out
