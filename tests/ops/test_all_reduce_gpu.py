"""All-reduce kernels between GPUs: the same sums as NCCL, the same bits on every rank, in graphs and outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.spec_decode.conftest import assert_same_outputs

from quire import LLM, SamplingParams
from quire.core.testing.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "all_reduce.py"


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("features", [4096, 8192])
def test_sums_are_those_of_nccl(features: int) -> None:
    """From 8 KiB to 16 MiB, with and without residual and norm."""
    command = [sys.executable, str(SCRIPT), "--features", str(features), "--check-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tokens_are_those_of_nccl(tmp_path: Path) -> None:
    """A model in graphs, with prompts in steps outside of them."""
    path = make_tiny_model("llama", tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    prompts = [[5 + i, 6, 7, 8 + i] * (1 + 5 * i) for i in range(6)]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=40, ignore_eos=True) for i in range(6)
    ]
    results = []
    for how in ("nccl", "auto"):
        llm = LLM(str(path), tensor_parallel_size=2, all_reduce=how, dtype="bfloat16", max_model_len=256)
        results.append(llm.generate(prompts, params))
        llm.shutdown()
    for one, other in zip(*results, strict=True):
        assert_same_outputs(one, other)
