"""Benchmarks of a server: rates, chats, pictures, overload and start-up, against a real one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from quire.server.cli.main import main

from ..conftest import RunningServer

SMALL = ["--input-len", "20", "--output-len", "6", "--vocab-size", "256"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_a_run_for_each_rate(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "6", *SMALL, "--random-range-ratio", "0.5"]
    assert main([*words, "--request-rate", "60", "inf", "--json"]) == 0
    slow, fast = lines(capsys)
    assert (slow["request_rate"], fast["request_rate"]) == (60.0, 0.0)
    for figures in (slow, fast):
        assert figures["successful"] == 6 and figures["requests_s"] > 0
        assert figures["longest_stall_s"] >= figures["itl_s"]["p99"] > 0


def test_a_repeated_seed_is_warned_of(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "serve",
        "--base-url",
        server.url,
        "--num-prompts",
        "4",
        "--input-len",
        "100",
        "--output-len",
        "2",
    ]
    words += ["--vocab-size", "256", "--json", "--seed"]
    assert main([*words, "4711"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cached_prompt_share"] < 0.5 and "warning" not in captured.err
    assert main([*words, "4711"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cached_prompt_share"] > 0.5
    [line] = captured.err.splitlines()
    assert "prefix cache" in line and line.endswith("give each load a --seed of its own")
    assert main([*words, "4712", "--request-rate", "inf", "inf"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("and each rate a command of its own")


def test_chats_over_a_file_of_prompts(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text('{"prompt": "hello"}\n{"question": "and you?", "answer": "well"}\n')
    host, _, port = server.url.removeprefix("http://").partition(":")
    words = ["bench", "serve", "--host", host, "--port", port, "--backend", "openai-chat", "--dataset-name", "custom"]
    assert main([*words, "--num-prompts", "5"]) == 2 and "name its file with --dataset" in capsys.readouterr().err
    assert main([*words, "--dataset", str(file), "--num-prompts", "5", "--output-len", "7", "--json"]) == 0
    (figures,) = lines(capsys)
    assert figures["successful"] == 5 and figures["output_tok_s"] > 0 and figures["ttft_s"]["p50"] > 0


def test_a_picture_is_promised_or_refused_before_the_load(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "3", *SMALL, "--request-rate", "50", "200"]
    assert main([*words, "--plot", str(tmp_path / "no" / "load.png")]) == 2
    assert "folder that exists" in capsys.readouterr().err
    picture = tmp_path / "load.png"
    if importlib.util.find_spec("matplotlib") is None:
        assert main([*words, "--plot", str(picture)]) == 2
        shown = capsys.readouterr()
        assert "pip install 'quire[plot]'" in shown.err and "Successful" not in shown.out
    else:
        assert main([*words, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_more_load_than_it_sustains(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "soak", "--base-url", server.url, *SMALL, "--duration", "3", "--minute", "1"]
    assert main([*words, "--num-prompts", "8", "--max-concurrency", "4", "--overload", "1.5", "--json"]) == 0
    (figures,) = lines(capsys)
    assert len(figures["minutes"]) == 3 and figures["failed"] == 0
    assert figures["request_rate"] == pytest.approx(1.5 * figures["sustained_requests_s"])
    assert all(minute["output_tok_s"] > 0 for minute in figures["minutes"])
    assert (
        0 < figures["longest_overall_stall_s"] < 3
        and figures["longest_stall_s"] > 0
        and figures["last_over_second"] > 0
    )


def test_starting(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", tiny_model, "--max-num-seqs", "4", "--max-model-len", "64", "--json"]) == 0
    (figures,) = lines(capsys)
    assert "4.0 requests of 64 tokens at once" in figures["ready"]
    for state in ("cold", "warm"):
        assert figures[state]["ready_s"] == pytest.approx(sum(figures[state]["phases_s"].values()), abs=0.1)
        assert figures[state]["phases_s"]["weights"] >= 0 and figures[state]["first_token_s"] > 0


def test_a_server_that_cannot_start(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "soak", tiny_model, "--max-model-len", "999999"]) == 2
    assert "999999" in capsys.readouterr().err
