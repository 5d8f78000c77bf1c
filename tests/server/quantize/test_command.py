"""``quire quantize``: what it refuses before anything is loaded, its calibration, and the tools where there are any."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.server.quantize.test_checks import write_example

from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import ConfigError
from quire.core.loading.hub import resolve_model
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.quantizer import quantizers
from quire.server.cli.main import main
from quire.server.quantize.calibration import load_samples

ROOT = Path(__file__).parents[3]
TOOLS = [
    ("awq", quantizers.AWQQuantizer),
    ("gptq", quantizers.GPTQQuantizer),
    ("gptq", quantizers.OptimumGPTQQuantizer),
]
TOOLS += [("fp8", quantizers.Fp8Quantizer), ("int8", quantizers.Int8Quantizer)]


@pytest.fixture
def everything_installed(tmp_path):
    """An interpreter that says every tool is there, and dies when one is used."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexit 3\n')
    path.chmod(0o755)
    return str(path)


def refusal(capsys, *words):
    assert main(["quantize", *words]) == 2
    text = capsys.readouterr().err
    assert text.splitlines()[-1].startswith("quire: error: ") and "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gguf"], "--method 'gguf' is not known; choose awq, gptq, fp8, int8"),
        (
            ["--method", "awq", "--tool", "llmcompressor"],
            "--tool llmcompressor is not for --method awq; choose autoawq",
        ),
        (["--method", "awq", "--tool", "bnb"], "--tool bnb is not for --method awq; choose autoawq"),
        (["--method", "fp8", "--scheme", "gemm"], "--scheme 'gemm' is none of fp8; choose dynamic"),
        (["--method", "fp8", "--group-size", "64"], "--group-size is for awq and gptq"),
        (["--method", "awq", "--group-size", "0"], "--group-size must be -1 (a whole column) or at least 8, got 0"),
        (["--method", "fp8", "--samples", "9"], "--samples: fp8 dynamic needs no text"),
        (["--method", "gptq", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["--method", "gptq", "--sequence-length", "8"], "--sequence-length must be at least 16, got 8"),
        (["--method", "fp8", "--no-eval", "--max-loss", "1"], "leave out --no-eval"),
        (["--method", "fp8", "--python", "./no-python"], "--python './no-python' is not an interpreter"),
    ],
)
def test_what_is_refused_at_once(words, message, capsys, tmp_path):
    assert message in refusal(capsys, "quire-tiny", "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_where_it_may_write(capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("full", "is not empty; give a new folder"), ("file", "is a file; give a new folder")):
        assert message in refusal(capsys, "quire-tiny", "--method", "fp8", "--out", str(tmp_path / name))
    assert (tmp_path / "full" / "config.json").read_text() == "mine"


@pytest.mark.parametrize(("method", "quantizer"), TOOLS)
def test_a_tool_that_is_missing_is_named_with_its_extra(method, quantizer, capsys, tmp_path):
    """In this environment and in another one; the extras named are in pyproject.toml and bring the tool."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    words = ["quire-tiny", "--method", method, "--tool", quantizer.tool, "--out", str(tmp_path / "out")]
    message = refusal(capsys, *words, "--python", str(bare))
    assert f"{quantizer.tool} is not installed for {bare}" in message
    [wanted] = re.findall(rf"{re.escape(str(bare))} -m pip install '(\S+)'", message)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if wanted.startswith("quire["):
        assert any(line.startswith(quantizer.tool) for line in extras[wanted[len("quire[") : -1]])
    else:  # in an environment of its own, without Quire
        assert wanted in extras["quantize"] and "environment of its own" in message


def test_models_that_cannot_be_quantized(everything_installed, capsys, tmp_path):
    words = ["--method", "awq", "--out", str(tmp_path / "out"), "--python", everything_installed]
    assert "'./nowhere' does not exist" in refusal(capsys, "./nowhere", *words)
    model = make_tiny_model("llama", tmp_path / "m", max_position_embeddings=256)
    assert "longer than the context" in refusal(capsys, str(model), *words)
    words += ["--sequence-length", "64"]
    message = refusal(capsys, str(model), *words)
    assert (
        "hidden_size 64 of" in message and "does not divide into groups of 128; choose another --group-size" in message
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "is quantized already (awq)" in refusal(capsys, str(model), *words)


def test_a_tool_that_dies_leaves_nothing_behind(everything_installed, capsys, tmp_path):
    words = ["--method", "fp8", "--out", str(tmp_path / "deep" / "out"), "--python", everything_installed]
    assert "llmcompressor could not quantize" in refusal(capsys, "quire-tiny", *words)
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("mode", ["raises", "exits", "writes nothing", "returns nothing"])
def test_a_quantizer_of_another_package_that_fails(mode, capsys, tmp_path, monkeypatch):
    code = """
from quire.sdk import Quantizer

class Fails(Quantizer):
    uncalibrated = schemes = ("one",)

    def quantize(self, job):
        if MODE == "raises":
            raise ValueError("no such layer")
        if MODE == "exits":
            raise SystemExit(3)
        if MODE == "returns nothing":
            job.out.mkdir()
        return "fails 1.0"
"""
    (tmp_path / "failing_quantizer.py").write_text(f"MODE = {mode!r}\n" + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing_quantizer", raising=False)
    words = ["--method", "failing_quantizer:Fails", "--out", str(tmp_path / "deep" / "out")]
    assert "quantizer/failing_quantizer:Fails" in refusal(capsys, "quire-tiny-draft", *words)
    assert os.listdir(tmp_path / "deep") == []


def test_a_quantizer_of_another_package_writes_a_checkpoint(capfd, tmp_path, monkeypatch):
    """What ``quire plugins new`` writes: its checkpoint, with the tokenizer beside it. Checks serve such a one."""
    write_example(tmp_path, monkeypatch)
    out = tmp_path / "out"
    words = ["--method", "round_to_fp8:RoundToFp8", "--out", str(out), "--no-eval"]
    assert main(["quantize", "quire-tiny-draft", *words]) == 0
    text = capfd.readouterr().out
    assert "% of the 2.3 MB before; round-to-fp8 0.1.0" in text
    assert (out / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(str(resolve_model("quire-tiny")))


def test_calibration_of_its_own(tokenizer):
    samples = load_samples(tokenizer, None, 40, 128)
    assert len(samples) == 40 and {len(tokens) for tokens in samples} == {128}
    assert len({tuple(tokens) for tokens in samples}) == 40
    text = tokenizer.decode([token for tokens in samples for token in tokens])
    assert "<|im_start|>assistant" in text and "import " in text
    assert samples == load_samples(tokenizer, None, 40, 128)


def test_calibration_of_a_file(tokenizer, tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("one two three " * 500)
    samples = load_samples(tokenizer, plain, 4, 64)
    assert len(samples) == 4 and "two three one" in tokenizer.decode(samples[1])
    lines = [{"text": "plain words " * 40}, {"messages": [{"role": "user", "content": "ask me " * 40}]}]
    chats = tmp_path / "a.jsonl"
    chats.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    text = "".join(tokenizer.decode(tokens) for tokens in load_samples(tokenizer, chats, 100, 16))
    assert "plain words" in text and "<|im_start|>user" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "short", "less than one sample of 64"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: it has neither text nor messages"),
        ("a.jsonl", "[1]", "line 1: it has neither text nor messages"),
        ("a.jsonl", "{", "line 1: "),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_calibration_that_is_none(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_samples(tokenizer, tmp_path / name, 4, 64)


@pytest.mark.parametrize(
    ("method", "tool", "more"),
    [
        ("fp8", "llmcompressor", []),
        ("int8", "llmcompressor", ["--scheme", "rounded"]),
        ("gptq", "llmcompressor", ["--samples", "4", "--sequence-length", "64"]),
        ("gptq", "optimum", ["--samples", "4", "--sequence-length", "64"]),
        ("awq", "autoawq", ["--samples", "4", "--sequence-length", "64"]),
    ],
)
def test_the_real_tool_and_the_comparison(method, tool, more, tmp_path, capfd):
    """Where the tool is installed: quire-tiny-draft, quantized, loads and says much the same."""
    pytest.importorskip(next(quantizer.module for _, quantizer in TOOLS if quantizer.tool == tool))
    out = tmp_path / "out"
    words = ["quantize", "quire-tiny-draft", "--method", method, "--tool", tool, "--out", str(out), "--limit", "1"]
    assert main([*words, *more, "--device", "cpu"]) == 0
    text = capfd.readouterr().out
    assert "% of the 2.3 MB before" in text and "points of exact match" in text.splitlines()[-1]
    assert float(re.findall(r"KL\(A \|\| B\)\s+(\S+)", text)[0]) < 0.5
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert any("scale" in name for name in weights.keys())  # noqa: SIM118


def test_the_tools_start_without_quire():
    """They may run in an environment that has no Quire, under an interpreter that has no PYTHONPATH."""
    script = ROOT / "plugins" / "quantizer" / "tools.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script)], input="{}", capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyError: 'tool'" in done.stderr


def test_the_documentation_lists_every_flag():
    from quire.server.cli.main import make_parsers

    _, subparsers = make_parsers()
    text = (ROOT / "docs" / "cli.md").read_text().partition("## `quire quantize`")[2]
    quantize_flags = [n for n in subparsers.choices["quantize"].list_flags() if n not in ("-h", "--help")]
    assert len(quantize_flags) == 14
    assert [name for name in quantize_flags if f"`{name}" not in text] == []
