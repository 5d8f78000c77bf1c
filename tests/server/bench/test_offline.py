"""Benchmarks: the workloads are what they say, and each command measures and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.server.bench.datasets import read_prompts
from quire.server.bench.report import compute_percentiles
from quire.server.bench.workloads import make_workload
from quire.server.cli.main import main

from ..conftest import RunningServer


def test_nano_is_draw_for_draw_what_others_ran() -> None:
    nano = make_workload("nano")
    assert (len(nano.prompts), nano.input_tokens, nano.output_tokens) == (256, 142_827, 133_966)
    assert all(100 <= len(prompt) <= 1024 and min(prompt) >= 0 and max(prompt) <= 10_000 for prompt in nano.prompts)
    assert make_workload("nano") == nano


@pytest.mark.parametrize(
    ("name", "count", "prompt", "answer"),
    [
        ("decode-bs1", 1, 128, 256),
        ("decode-bs256", 256, 128, 256),
        ("decode-bs64x2048x128", 64, 2048, 128),
        ("prefill", 64, 2048, 1),
        ("prefill-64x2048", 64, 2048, 1),
        ("decode-bs8-sampled", 8, 128, 256),
        ("latency-long", 1, 8192, 128),
    ],
)
def test_shapes(name: str, count: int, prompt: int, answer: int) -> None:
    workload = make_workload(name)
    assert [len(p) for p in workload.prompts] == [prompt] * count and list(workload.max_tokens) == [answer] * count


def test_shrinking() -> None:
    workload = make_workload("decode-bs8").limit_requests(3).scale_lengths(0.1).wrap_token_ids(50)
    assert [len(p) for p in workload.prompts] == [13] * 3 and list(workload.max_tokens) == [26] * 3
    assert max(map(max, workload.prompts)) < 50
    for name in ("decode-bs0", "nanoo", "decode-bs"):
        with pytest.raises(ConfigError, match="choose nano"):
            make_workload(name)


def test_percentiles() -> None:
    assert compute_percentiles([]) == {}
    assert compute_percentiles([3.0, 1.0, 2.0]) == {"mean": 2.0, "p50": 2.0, "p99": 3.0}


def test_throughput_beside_transformers(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "throughput", "--model", tiny_model, "--workload", "decode-bs4", "--num-prompts", "3"]
    assert main([*words, "--scale", "0.05", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("quire: ") and "output tokens/s" in line for line in lines)
    assert any(line.startswith("transformers.generate, batches of 8: ") for line in lines)
    figures = json.loads(last)
    assert figures["requests"] == 3 and figures["input_tokens"] == 18 and figures["output_tokens"] == 39
    assert figures["output_tok_s"] > 0 and figures["decode_tok_s"] > 0 and figures["transformers"]["output_tok_s"] > 0


def test_a_workload_that_does_not_fit_the_model(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--model", tiny_model, "--workload", "latency-long"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "8320" in message and "--scale 0.24" in message


def test_latency(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "latency",
        "--model",
        tiny_model,
        "--output-len",
        "4",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "0",
    ]
    assert main([*words, "--json"]) == 0
    line, last = capsys.readouterr().out.splitlines()[-2:]
    assert "ms a token" in line and json.loads(last)["p50_s"] > 0


def test_load_on_a_server(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "serve",
        "--base-url",
        server.url,
        "--num-prompts",
        "12",
        "--input-len",
        "20",
        "--output-len",
        "6",
    ]
    words += ["--vocab-size", "256", "--max-concurrency", "4", "--request-rate", "500"]
    assert main(words) == 0
    assert "Successful requests" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["successful"] == 12 and figures["failed"] == 0 and figures["output_tok_s"] > 0
    assert set(figures["ttft_s"]) == {"mean", "p50", "p99"} and figures["model"] == "tiny"


def test_load_that_fails_says_so(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--input-len", "9", "--model", "nobody"]
    assert main(words) == 1
    assert "does not exist" in capsys.readouterr().out


def test_several_workloads_in_one_engine(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ceilings.json"
    assert main(["bench", "ceilings", "--device", "cpu", "--cpu-threads", "1", "--out", str(file), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["bytes_s"] > 1e8 and measured["flops_s"] > 1e8
    words = ["bench", "throughput", "--model", tiny_model, "--workload", "decode-bs2,prefill", "nano-sampled"]
    words += ["--num-prompts", "2", "--scale", "0.1", "--no-compare", "--json", "--cpu-threads", "1"]
    assert main([*words, "--ceilings", str(file)]) == 0
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [each["workload"] for each in runs] == ["decode-bs2", "prefill", "nano-sampled"]
    assert [each["temperature"] for each in runs] == [0.0, 0.0, 0.8]
    assert all(each["share_of_bound"] > 0 for each in runs) and runs[0]["decode_share_of_bound"] > 0


def test_conversations_of_a_file(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"value": "what is this thing about"}, {"value": "it is about that"}]
    file = tmp_path / "share.json"
    file.write_text(json.dumps([{"conversations": talk}, {"conversations": talk[:1]}]))
    words = ["bench", "throughput", "--model", tiny_model, "--dataset", str(file), "--num-prompts", "5"]
    assert main([*words, "--no-compare", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["workload"] == "share" and figures["requests"] == 1 and figures["output_tokens"] >= 4
    assert main([*words, "--workload", "nano"]) == 2
    assert "leave out --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("a.json", "{}"), ("a.jsonl", "[1]"), ("a.txt", ""), ("b.json", "no")])
def test_files_that_are_no_data_sets(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="--dataset"):
        read_prompts(str(tmp_path / name), 3)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(str(tmp_path / "absent.txt"), 3)
