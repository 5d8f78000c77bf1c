"""The Python in the README and in ``examples/`` runs as it stands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.layers import LayerBuilder
from quire.plugins.quant.none import Unquantized
from quire.testing import run_checks


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


@pytest.mark.parametrize(
    ("page", "plugin"),
    [
        ("plugins", "TakeTurns"),
        ("plugins", "Prefer"),
        ("plugins", "Swish"),
        ("policies", "SaltedFirst"),
        ("speculative", "Repeat"),
        ("simulating", "ByGroup"),
    ],
)
def test_the_python_of_a_page_passes_its_checks(page, plugin, python_of, tmp_path, monkeypatch):
    """All Python blocks of a page make one module."""
    (tmp_path / f"page_{page}.py").write_text(python_of(f"{page}.md"))
    monkeypatch.syspath_prepend(tmp_path)
    all_pass(getattr(importlib.import_module(f"page_{page}"), plugin))


def test_the_model_of_a_page_computes(python_of, tmp_path, monkeypatch):
    (tmp_path / "page_models.py").write_text(python_of("models.md"))
    monkeypatch.syspath_prepend(tmp_path)
    cpu = torch.device("cpu")
    builder = LayerBuilder(torch.float32, cpu, torch.float32, 16, Unquantized({}))
    config = SimpleNamespace(vocab_size=11, hidden_size=4, rms_norm_eps=1e-6)
    model = importlib.import_module("page_models").BigramForCausalLM(config, builder)
    weights = {"model.embed_tokens.weight": torch.randn(11, 4), "model.norm.weight": torch.ones(4)}
    for name, copy in model.checkpoint_map().items():
        copy(weights.pop(name))
    ids = torch.tensor([3, 5, 3], dtype=torch.int32)
    logits = model.compute_logits(model.forward(ids, torch.arange(3), None))
    assert not weights and logits.shape == (3, 11) and torch.equal(logits[0], logits[2])


def test_the_checkpoint_map_of_a_page_loads_gpt2s_matrix(python_of, tmp_path, monkeypatch):
    (tmp_path / "page_maps.py").write_text(python_of("plugins.md"))
    monkeypatch.syspath_prepend(tmp_path)
    builder = LayerBuilder(torch.float32, torch.device("cpu"), torch.float32, 16, Unquantized({}))
    model = torch.nn.Module()
    model.add_module("qkv", builder.make_qkv_parallel_linear("h.0.attn", 4, 1, 1, 4))
    loaders, stored, x = (
        importlib.import_module("page_maps").checkpoint_map(model),
        torch.randn(4, 12),
        torch.randn(2, 4),
    )
    loaders["h.0.attn.c_attn.weight"](stored)
    assert torch.allclose(model.qkv(x), x @ stored, atol=1e-6)


def all_pass(plugin):
    results = run_checks(plugin)
    assert len(results) > 5
    assert not [result for result in results if result.outcome == "failed"]


def test_the_client_of_the_server_page_streams(python_of, server, capsys):
    pytest.importorskip("openai")
    exec(compile(python_of("server.md").replace("http://127.0.0.1:8000", server), "server.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_python_of_the_page_on_tools_calls_one(python_of, server, capsys, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    (tmp_path / "page_tools.py").write_text(python_of("tool-calling.md").replace("http://127.0.0.1:8000", server))
    monkeypatch.syspath_prepend(tmp_path)
    all_pass(importlib.import_module("page_tools").ActionJson)
    assert capsys.readouterr().out == "get_current_weather {'location': 'Paris'}\n"


def test_every_python_block_is_run(all_blocks):
    pages = {block.where.partition(":")[0] for block in all_blocks if block.language == "python"}
    run_here = {"README.md", "plugins.md", "policies.md", "speculative.md", "models.md", "server.md", "simulating.md"}
    elsewhere = {"coming-from-vllm.md", "tool-calling.md", "structured-output.md", "lora.md", "kernels.md"}
    # lora.md: tests/server/http/test_adapters.py
    assert pages == run_here | elsewhere | {"third-party-plugin.md", "write-a-policy.md"}


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


def test_tool_agent(root, server):
    pytest.importorskip("openai")
    lines = run(root, "examples/tool_agent.py", "--base-url", f"{server}/v1")
    assert lines[0].startswith('get_current_weather({"location": "Paris", "unit": "celsius"}) -> {"temperature": 21')
    assert "21" in lines[-1] and len(lines) == 2
