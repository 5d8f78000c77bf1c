"""``quire plugins new``: what it writes installs, passes its test, and serves, untouched: on a GPU if there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugin.conftest import install_packages, make_environment

from quire.core.errors import PluginError
from quire.core.plugin.registry import KINDS
from quire.core.testing.tiny_models import make_example_model, make_tiny_model, save_example_model
from quire.server.cli.main import main
from quire.server.cli.plugins_new import NEW_KINDS, NewPackage

LARGE = {"attention", "kv", "quant", "model", "quantizer", "executor", "structured_output", "adapter"}
NAMES = {kind: f"fresh-{kind.replace('_', '-')}" for kind in NEW_KINDS} | {"model": "OPTForCausalLM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        assert main(["plugins", "new", kind, name, "--into", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(folder, tmp_path_factory):
    """Everything installed by pip, without isolation and without an index."""
    site = tmp_path_factory.mktemp("site")
    install_packages(site, folder.iterdir())
    return site


def test_every_kind_has_a_template():
    assert {*NEW_KINDS} == {*KINDS, "route"}


def test_a_bundled_name_is_refused():
    with pytest.raises(PluginError, match="'fcfs' is a scheduling policy of Quire; choose another name"):
        NewPackage.from_words("policy", "fcfs")


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_it_is_short(kind):
    files = NewPackage.from_words(kind, NAMES[kind]).make_files()
    num_lines = sum(len(text.splitlines()) for text in files.values())
    assert num_lines <= (160 if kind in LARGE else 60)
    for text in files.values():
        assert "emplate" not in text and max(map(len, text.splitlines())) <= 120
        assert "quire.plugins" not in text and "quire.core" not in text


def test_the_tests_of_all_pass(folder, site):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", folder]
    command += ["--rootdir", folder]
    result = subprocess.run(
        command, capture_output=True, text=True, env=make_environment(site), cwd=folder, timeout=600
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
    assert "passed" in result.stdout


def test_ruff_has_nothing_against_them(folder):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--line-length", "120", "--isolated"]
    result = subprocess.run([*command, "--select", "E,F,W,I", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


SERVE = """
import json, sys
from quire import LLM, SamplingParams
model, kinds, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(model=model, dtype="float32", max_model_len=96, num_gpu_blocks_override=64,
          plugins=["quire-fresh-route", "quire-optfor-causal-lm"], **kinds)
params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=1 + i % 2) for i in range(len(prompts))]
outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
stats = llm.get_stats()
plugins = {key: choice.target for key, choice in llm.config.plugins.items()}
print(json.dumps([[c.token_ids for o in outputs for c in o.outputs], stats["plugin_quarantines_total"], plugins]))
llm.shutdown()
"""
SETTINGS = {
    "attention": "attention_backend",
    "kv": "kv_allocator",
    "policy": "scheduling_policy",
    "sampler": "sampler",
    "executor": "executor",
    "spec_decode": "spec_method",
    "tool_parser": "tool_call_parser",
    "reasoning_parser": "reasoning_parser",
    "structured_output": "structured_output_backend",
}


def serve(site, model, kinds, prompts):
    result = subprocess.run(
        [sys.executable, "-c", SERVE, model, json.dumps(kinds), json.dumps(prompts)],
        capture_output=True, text=True, env=make_environment(site), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tokens, num_quarantined, plugins = json.loads(result.stdout.splitlines()[-1])
    assert num_quarantined == 0, result.stderr
    return tokens, plugins


def assert_greedy(reference, prompts, tokens):
    rows = iter(tokens)
    for i, prompt in enumerate(prompts):
        for _ in range(1 + i % 2):
            generated = next(rows)
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
            best, chosen = logits.max(-1).values, logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
            assert (best - chosen).max() < 1e-2


def test_all_serve_together_by_their_names(site, tmp_path):
    """The model, with each component but the format of weights."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2}
    config = {"model_type": "opt", "vocab_size": 259, "num_attention_heads": 4, "max_position_embeddings": 128, **sizes}
    reference = make_example_model({**config, "architectures": ["OPTForCausalLM"], "eos_token_id": 258})
    save_example_model(reference, tmp_path)
    kinds = {setting: f"fresh_{kind}" for kind, setting in SETTINGS.items()}
    kinds |= {"logits_processors": ["fresh_logits_processor"], "metrics": ["fresh_metrics"]}
    kinds |= {"plugin_options": {"logits_processor": {"penalty": 0.0}}}
    prompts = [[7, 8, 9] * (2 + 5 * i) for i in range(5)]
    tokens, plugins = serve(site, str(tmp_path), kinds, prompts)
    assert_greedy(reference, prompts, tokens)
    assert {target.partition(":")[0] for target in plugins.values()} > {
        f"quire_fresh_{kind}.{kind}" for kind in (*SETTINGS, "logits_processor", "metrics")
    } | {"quire_optfor_causal_lm.model"}


def test_a_checkpoint_of_the_new_format_is_served(site, tmp_path):
    path = make_tiny_model("llama", tmp_path)
    tensors, stored = load_file(path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            scale = tensor.abs().amax(1) / 127
            stored[name] = (tensor / scale[:, None]).round().to(torch.int8)
            stored[name.replace(".weight", ".scale")] = scale
            tensors[name] = stored[name] * scale[:, None]
        else:
            stored[name] = tensor
    from transformers import AutoModelForCausalLM

    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fresh_quant"}}))
    prompts = [[7, 8, 9] * (1 + i) for i in range(3)]
    tokens, plugins = serve(site, str(path), {}, prompts)
    assert plugins["quant"] == "quire_fresh_quant.quant:FreshQuant"
    assert_greedy(reference, prompts, tokens)


@pytest.fixture
def site_of_two(site, tmp_path):
    """A package of hooks alone, and a policy."""
    for name in ("quire_fresh_route", "quire_fresh_policy"):
        for path in site.glob(f"{name}*"):
            shutil.copytree(path, tmp_path / path.name)
    return tmp_path


def test_packages_of_hooks_alone_are_shown(site_of_two, quire):
    site = site_of_two
    report = quire("plugins", "list", site=site, json_output=True)
    (package,) = report["packages"]
    assert package["dist"] == "quire-fresh-route" and list(package["hooks"]) == ["quire_extend_app"]
    assert "quire-fresh-route" in quire("plugins", "list", site=site).stdout
    explained = quire("plugins", "explain", "quire-fresh-route", site=site).stdout
    assert "--plugin quire-fresh-route" in explained and "Add routes or middleware" in explained
    report = quire("plugins", "doctor", site=site, json_output=True)
    assert not report["problems"]
    by_dist = {entry["dist"]: entry for entry in report["third_party"]}
    assert by_dist["quire-fresh-route"]["hooks"] == ["quire_extend_app"]
    assert "no installed" not in quire("plugins", "explain", "policy/fresh_policy", site=site).stdout
    refused = quire("plugins", "explain", "quire-fresh-rout", site=site, code=2).stderr
    assert "did you mean quire-fresh-route" in refused


def test_nothing_is_overwritten(folder, capsys):
    assert main(["plugins", "new", "policy", NAMES["policy"], "--into", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("polcy", "x"), ("policy", "1x"), ("policy", "a/b"), ("policy", "auto")])
def test_wrong_words_are_refused_on_one_line(kind, name, tmp_path, capsys):
    assert main(["plugins", "new", kind, name, "--into", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())


CONSTRAIN = """
import json, sys
from quire import LLM, LoRARequest, SamplingParams
from quire.sdk import StructuredOutputsParams
model, adapter = sys.argv[1:]
llm = LLM(model=model, max_model_len=96, num_gpu_blocks_override=64,
          structured_output_backend="fresh_structured_output", enable_lora=True, adapter_method="fresh_adapter")
choices = ["paged", "attention is"]
params = SamplingParams(temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=choices))
[chosen] = llm.generate(["Is it?"], params)
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
texts = [llm.generate(["Is it?"], greedy, lora_request=each)[0].outputs[0].token_ids
         for each in (None, LoRARequest("mine", 1, adapter))]
print(json.dumps([chosen.outputs[0].text, texts, llm.get_stats()["plugin_quarantines_total"]]))
llm.shutdown()
"""


def test_an_adapter_and_a_constraint_are_served(site, tmp_path):
    model = make_tiny_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    adapter = tmp_path / "adapter"
    shapes = {"model.layers.0.mlp.up_proj": (config["intermediate_size"], config["hidden_size"])}
    script = (
        "from pathlib import Path; from quire_fresh_adapter.adapter import FreshAdapter; "
        f"FreshAdapter.save_example_adapter(Path({str(adapter)!r}), {shapes!r}, 1)"
    )
    subprocess.run([sys.executable, "-c", script], env=make_environment(site), check=True, timeout=120)
    command = [sys.executable, "-c", CONSTRAIN, str(model), str(adapter)]
    result = subprocess.run(command, capture_output=True, text=True, env=make_environment(site), timeout=300)
    assert result.returncode == 0, result.stderr
    chosen, (base, adapted), num_quarantined = json.loads(result.stdout.splitlines()[-1])
    assert chosen in ("paged", "attention is") and base != adapted and num_quarantined == 0, result.stderr
