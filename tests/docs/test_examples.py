"""The Python in the README and in ``examples/`` runs as it stands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quire import LLM, SamplingParams


def run(root, *words):
    """Run an example as its docstring says, from the repository."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=root,
        env={"PYTHONPATH": "src", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def python_blocks(readme):
    return [block.text for block in readme if block.language == "python"]


def test_the_plugin_of_the_readme_chooses(readme, tmp_path, monkeypatch):
    text = python_blocks(readme)[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", '"""'))]
    assert len(lines) <= 5
    (tmp_path / "shortest_first.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    llm = LLM(model="quire-tiny", device="cpu", scheduling_policy="shortest_first:ShortestFirst")
    try:
        assert llm.config.plugin("policy").target == "shortest_first:ShortestFirst"
        (output,) = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=4))
        assert len(output.outputs[0].token_ids) == 4
    finally:
        llm.shutdown()
        sys.modules.pop("shortest_first", None)


def test_the_python_of_the_readme_runs(readme, capsys):
    names = {}
    exec(compile(python_blocks(readme)[1], "README.md", "exec"), names)
    names["llm"].shutdown()
    assert capsys.readouterr().out.count("->") == 2


def test_every_python_block_of_the_readme_is_run(readme):
    assert len(python_blocks(readme)) == 2


def test_offline_generate(root):
    lines = run(root, "examples/offline_generate.py", "--max-tokens", "8")
    assert sum("->" in line for line in lines) == 3


def test_openai_client(root, server):
    pytest.importorskip("openai")
    lines = run(root, "examples/openai_client.py", "--base-url", f"{server}/v1")
    assert lines[0].startswith("quire-tiny: ")
    assert lines[-1].endswith("tokens)")
