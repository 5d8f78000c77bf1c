"""The packages of ``examples/plugins``: built and installed for real, then used by name to serve tokens, on a GPU where
there is one."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugin.conftest import install_packages, make_environment

from quire.core.testing.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
INTERPRETED = {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
QUICK_ATTENTION = "signatures or check_decode or captured or check_softcap"
"""Checks of the Triton kernel that the interpreter runs in seconds; ``pytest`` in its folder runs all."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in NAMES:
        shutil.copytree(EXAMPLES / name, source / name)
    install_packages(site, [source / name for name in NAMES])
    return site


def run_python(site, *words):
    variables = {**make_environment(site), **INTERPRETED}
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return result.stdout


@pytest.mark.parametrize("interpreted", [False, True])
def test_their_own_tests_pass(site, interpreted):
    """In two processes: those of the Triton kernel, and all others."""
    names = [name for name in NAMES if (name == "triton-attention") == interpreted]
    words = ["-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", EXAMPLES]
    chosen = ["-k", QUICK_ATTENTION] if interpreted and not torch.cuda.is_available() else []
    passed = run_python(site, *words, *chosen, *(EXAMPLES / name / "tests" for name in names))
    for name in names:
        assert re.search(rf"^PASSED \S*/{name}/tests/test_", passed, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_it_imports_quire_through_its_public_faces_alone(name):
    for path in (EXAMPLES / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                is_public = module in ("quire.sdk", "quire.sdk.ops", "quire.sdk.layers", "quire.testing")
                assert module.split(".")[0] != "quire" or is_public, f"{path}: {module}"


SERVE = """
import json, sys
from quire import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=96, num_gpu_blocks_override=24, **json.loads(sys.argv[2]))
params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
outputs = [llm.generate([{"prompt_token_ids": p} for p in json.loads(sys.argv[3])], params) for _ in range(2)]
stats = llm.get_stats()
assert stats["plugin_quarantines_total"] == 0
plugins = {key: choice.target for key, choice in llm.config.plugins.items()}
print(json.dumps([[[o.outputs[0].token_ids for o in each] for each in outputs], plugins, stats]))
llm.shutdown()
"""
PROMPTS = [[7, 8, 9] * (1 + 4 * i) for i in range(3)]


def serve(site, model, **arguments):
    words = ["-c", SERVE, str(model), json.dumps(arguments), json.dumps(PROMPTS)]
    tokens, plugins, stats = json.loads(run_python(site, *words).splitlines()[-1])
    return tokens, plugins, stats


def assert_greedy(reference, tokens):
    for prompt, generated in zip(PROMPTS, tokens, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
        assert len(generated) == 10 and (logits.max(-1).values - chosen).max() < 1e-2


def load_reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_policy_attention_and_proposer_serve_together(site, tmp_path):
    path = make_tiny_model("llama", tmp_path)
    tokens, plugins, stats = serve(
        site, path, attention_backend="flat", scheduling_policy="take_turns",
        speculative_config={"method": "recall", "num_speculative_tokens": 3, "adaptive": False},
    )  # fmt: skip
    for each in tokens:
        assert_greedy(load_reference(path), each)
    modules = {plugins[kind].partition(":")[0] for kind in ("attention", "policy", "spec_decode")}
    assert modules == {"quire_flat_attention.backend", "quire_take_turns", "quire_recall.proposer"}
    assert stats["spec_decode_num_accepted_tokens_total"] > 10  # the second time it knows the answers


def test_a_checkpoint_in_nf4_is_served(site, tmp_path, monkeypatch):
    path = make_tiny_model("llama", tmp_path, intermediate_size=128)
    monkeypatch.syspath_prepend(site)
    from quire_nf4.loader import dequantize, quantize

    tensors, stored = load_file(path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            of_layer = quantize(tensor)
            tensors[name] = dequantize(of_layer["weight"], of_layer["scale"])
            stored |= {name.replace("weight", key): value.contiguous() for key, value in of_layer.items()}
        else:
            stored[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    reference = load_reference(path)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nf4"}}))
    tokens, plugins, _ = serve(site, path)
    assert plugins["quant"] == "quire_nf4.loader:NF4"
    assert_greedy(reference, tokens[0])


def test_route_command_flag_and_metric(site, tmp_path, monkeypatch):
    from tests.server.conftest import start_server

    monkeypatch.syspath_prepend(site)
    flags = ["--plugin", "quire-status-board", "--metrics", "board", "--board-title", "Mine"]
    flags += ["--num-gpu-blocks-override", "64"]
    server = start_server(tmp_path / "server", str(make_tiny_model("llama", tmp_path / "model")), *flags)
    try:
        with server.http as http:
            body = {"prompt": "x", "max_tokens": 7, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
            assert http.get("/board").json() == {"title": "Mine", "longest_answer": 7}
            assert 'board_longest_answer{model_name="' in http.get("/metrics").text
            assert "quire:num_requests_running" in http.get("/metrics").text
        printed = run_python(site, "-m", "quire", "--plugin", "quire-status-board", "board", "--url", server.url)
        assert printed == "Mine: longest answer 7 tokens\n"
    finally:
        server.stop()


def test_the_doctor_has_nothing_against_them(site, quire):
    report = quire("plugins", "doctor", site=site, json_output=True)
    assert report["problems"] == [] and len(report["third_party"]) == len(NAMES)
    plugins = {entry["dist"]: entry["plugins"] for entry in report["third_party"]}
    assert plugins["quire-take-turns"] == ["policy/take_turns"]
