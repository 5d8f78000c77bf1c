"""``docs/kernels.md``: its file is an attention backend, and each of its commands does what the page says."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import triton

from quire import LLM, SamplingParams
from quire.core.testing.example_engine import example_model
from quire.core.testing.oracle import assert_matches_reference
from quire.server.cli.main import main, make_parsers

SMALL = {"bench": ["--rounds", "3", "--only", "decode", "--device", "cpu"], "check": ["--only", "check_decode"]}


@pytest.fixture
def commands(python_of, root, tmp_path, monkeypatch):
    """The commands of the page, in the folder of its file."""
    (tmp_path / "my_decode.py").write_text(python_of("kernels.md"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield re.findall(r"^```\n(quire .*)\n```$", (root / "docs" / "kernels.md").read_text(), re.M)
    sys.modules.pop("my_decode", None)


def test_the_kernel_is_as_short_as_the_page_says(python_of):
    kernel = re.search(r"^def attend\(.*?(?=\n\n\nclass)", python_of("kernels.md"), re.M | re.S)[0]
    body = kernel.split("# fmt: skip\n")[1]
    assert len(body.splitlines()) <= 30


def test_there_are_five_commands(commands):
    assert len(commands) == 5
    for command in commands:
        parser, _ = make_parsers()
        parser.parse_args(command.split()[1:])


def test_it_is_right_and_timed(commands, capsys):
    """The first command and the third, small, in Triton's interpreter."""
    assert main([*commands[0].split()[1:], *SMALL["check"]]) == 0
    assert "passed   check_decode" in capsys.readouterr().out
    assert main([*commands[2].split()[1:], *SMALL["bench"], "--json"]) == 0
    mine, bundled = json.loads(capsys.readouterr().out)["rows"]
    assert mine["implementation"] == "my_decode.py:MyDecode" and mine["error"] < 1e-5 and mine["microseconds"] > 0
    assert bundled["implementation"] == "triton" and bundled["ratio"]["median"] > 0


def test_it_is_served(commands, tmp_path):
    """The last command's choice, on a tiny model, compared with transformers."""
    (backend,) = re.findall(r"--attention-backend (\S+)", commands[4])
    prompt, params = [5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with example_model() as (folder, reference):
        llm = LLM(model=str(folder), device="cpu", cpu_threads=1, max_model_len=64, attention_backend=backend)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
        assert llm.config.plugin("attention").target == "my_decode:MyDecode"
        llm.shutdown()
        assert_matches_reference(reference, prompt, output.outputs[0].token_ids, params)


@pytest.mark.parallel
def test_it_is_compared_end_to_end(commands, capsys):
    """The fourth command, with a workload of few tokens."""
    words = [*SMALL["bench"], "--workload", "decode-bs1x2x2", "--json"]
    assert main([*commands[3].split()[1:], *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["end_to_end"]["subject_rates"]) == 5


def test_what_was_not_checked_is_said(commands, capsys, monkeypatch):
    """The first command without the interpreter, on a machine without a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*commands[0].split()[1:], "--only", "check_"]) == 0
    printed = capsys.readouterr().out
    assert " skipped" in printed and "most were skipped, and say nothing about it: " in printed
    assert "or with TRITON_INTERPRET=1" in printed


@pytest.mark.aot
def test_it_compiles_for_other_gpus(commands, capsys):
    """The second command."""
    assert main([*commands[1].split()[1:], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(row["kernel"], row["target"]) for row in report["kernels"]} == {("attend", n) for n in (80, 90, 100)}
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 for row in report["kernels"])


@pytest.mark.aot
def test_a_kernel_that_does_not_fit_or_compile_fails(tmp_path, capsys):
    (tmp_path / "aot_bad.py").write_text(BAD)
    assert main(["plugins", "check", str(tmp_path / "aot_bad.py"), "--aot", "sm_80"]) == 1
    text = capsys.readouterr().out
    assert "! broken on sm_80: " in text and "1 of 1 failed" in text
    sys.modules.pop("aot_bad", None)


BAD = '''
import triton
import triton.language as tl
from quire.sdk import Operations

@triton.jit
def broken(x, n: tl.constexpr):
    tl.store(x + tl.arange(0, 3), 1.0)

class Bad(Operations):
    """Its kernel does not compile."""

    @classmethod
    def unsupported(cls, device):
        return []

    def silu_and_mul(self, gate_up, output_format):
        broken[(1,)](gate_up, n=3)
        return gate_up
'''


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["op/triton", "--aot", "hopper"], "--aot hopper: write targets such as sm_80,sm_90,sm_100"),
        (["op/triton", "--aot", "sm_90"], "unset TRITON_INTERPRET"),
        (["policy/fcfs", "--only", "no_such"], "no check of policy has that in its name"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_line(words, reason, capfd):
    if reason.startswith("unset") and not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here")
    assert main(["plugins", "check", *words]) == 2
    error = capfd.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
