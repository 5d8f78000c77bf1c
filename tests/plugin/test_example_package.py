"""The example is built and installed for real, then used by name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins" / "take-turns"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "take-turns"
    shutil.copytree(EXAMPLE, source)
    site = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", site, source], check=True, timeout=120)
    return site


def test_installing_it_changes_nothing(site, quire):
    report = quire("plugins", "list", "policy", site=site, json_output=True)
    assert [p["name"] for p in report["plugins"] if p["active"]] == ["fcfs"]
    assert report["plugins"][-1]["dist"] == "quire-take-turns" and not report["refused"]


def test_naming_it_is_enough(site, quire):
    explained = quire("plugins", "explain", "policy/take_turns", site=site).stdout
    assert "quire-take-turns 1.0.0" in explained and "--scheduling-policy-option burst: int = 1" in explained
    assert "checks failed" in quire("plugins", "check", "policy/take_turns", site=site).stdout


def test_an_engine_runs_on_it(site, tmp_path, monkeypatch):
    from quire import LLM, SamplingParams
    from quire.core.testing.tiny_models import make_tiny_model

    monkeypatch.syspath_prepend(site)
    model = make_tiny_model("llama", tmp_path / "model")
    tokens = []
    for changes in ({}, {"scheduling_policy": "take_turns", "plugin_options": {"policy": {"burst": "2"}}}):
        llm = LLM(model=str(model), device="cpu", num_gpu_blocks_override=64, max_num_seqs=2, **changes)
        outputs = llm.generate(["hello", "a b c", "xyz"], SamplingParams(temperature=0, max_tokens=6))
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert llm.config.plugin("policy").target == "quire_take_turns:TakeTurns"
    assert tokens[0] == tokens[1]


def test_it_is_about_thirty_lines():
    lines = (EXAMPLE / "quire_take_turns.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32
