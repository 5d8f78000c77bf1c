"""On a GPU: checks that need one, of bundled plugins and of the example's Triton kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.core.plugin.manager import PluginManager
from quire.core.testing.conformance import run_check, run_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "name", "check"),
    [
        ("attention", "triton", "check_captured_steps"),
        ("sampler", "gumbel", "check_sampling_from_the_table_is_the_same"),
    ],
)
def test_a_check_that_needs_a_gpu_passes(kind: str, name: str, check: str) -> None:
    result = run_check(PluginManager().load_class(kind, name), check)
    assert result.outcome == "passed", result


def test_the_kernel_of_the_example_passes_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugins" / "triton-attention")
    results = run_checks(PluginManager().load_class("attention", "quire_flat_attention.backend:FlatAttention"))
    assert not [result for result in results if result.outcome == "failed"]
    passed = {result.name for result in results if result.outcome == "passed"}
    assert {"check_captured_steps", "check_batch_invariance", "check_half_precision"} <= passed


def test_an_engine_serves_on_the_kernel_of_the_example() -> None:
    """Captured decodes and prompts; the tokens are those of the bundled kernels but for near ties."""
    script = """
import torch
from quire import LLM, SamplingParams
for backend in ("triton", "quire_flat_attention.backend:FlatAttention"):
    llm = LLM(model="quire-tiny", attention_backend=backend, max_model_len=512, num_gpu_blocks_override=500)
    outputs = llm.generate(["Paged attention is"] * 4, SamplingParams(temperature=0, max_tokens=32))
    assert all(len(output.outputs[0].token_ids) > 4 for output in outputs)
    assert llm.get_stats()["step_failures_total"] == 0
    llm.shutdown()
"""
    paths = (ROOT / "src", ROOT / "examples" / "plugins" / "triton-attention")
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *inherited])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=600)
