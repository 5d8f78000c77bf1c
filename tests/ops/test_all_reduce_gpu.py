"""All-reduce kernels between GPUs: the same sums as NCCL, the same bits on every rank, in graphs and outside."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.spec_decode.conftest import assert_same_outputs

from quire import LLM, SamplingParams
from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.all_reduce_launch import MAX_PROGRAMS, SymmetricLayout, launch_one_shot_norm
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.compilation import precompile_kernels

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "all_reduce.py"


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("marked", [False, True], ids=["flags", "marks"])
def test_ranks_of_one_gpu_wait_for_each_other(marked: bool) -> None:
    """Two streams are the ranks: the protocol between programs that run at the same time, a thousand calls in graphs,
    beside a copy that delays now the one and now the other."""
    device = torch.device("cuda")
    layout = SymmetricLayout(2)
    memory = [torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    buffers = torch.tensor([each.data_ptr() for each in memory], device=device)
    epochs = [torch.zeros(3, MAX_PROGRAMS, dtype=torch.int32, device=device) for _ in range(2)]
    parts = [torch.randn(8, 4096, device=device).bfloat16() for _ in range(2)]
    residual, weight = torch.randn(8, 4096, device=device).bfloat16(), torch.rand(4096, device=device).bfloat16()
    expected, stream = launch_rms_norm((parts[0].float() + parts[1].float()).bfloat16(), weight, 1e-5, residual)
    large = torch.zeros(4 << 20, device=device)
    large.copy_(large.flip(0))
    wanted = ActivationFormat()

    def run(rank: int) -> list[tuple[Any, torch.Tensor]]:
        results = []
        for call in range(50):
            if call % 7 == 3 * rank:
                large.copy_(large.flip(0))
            results.append(launch(*ranks[rank]))
        return results

    launch = partial(launch_one_shot_norm, marked=marked)
    ranks = [(parts[rank], residual, weight, 1e-5, wanted, buffers, epochs[rank], layout, rank) for rank in range(2)]
    precompile_kernels(lambda: [launch(*arguments) for arguments in ranks])  # a kernel that waits would stop loading
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, results = [], []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[rank]):
            results.append(run(rank))
        graphs.append(graph)
    for _ in range(20):
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
    torch.cuda.synchronize()
    assert all(int(each[0, :8].max()) == int(each[0, :8].min()) == 1000 for each in epochs)
    for normed, summed in [pair for of_rank in results for pair in of_rank]:
        assert torch.equal(summed, stream) and torch.equal(normed, expected)


@two_gpus
def test_parts_are_sent_while_the_product_runs() -> None:
    """The sums and norms of NCCL and the norm's own kernel, the same bits on both ranks, ten times."""
    command = [sys.executable, str(SCRIPT), "--inputs", "2048", "7168", "--kib", "16384", "131072"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@two_gpus
@pytest.mark.parametrize("features", [4096, 8192])
def test_sums_are_those_of_nccl(features: int) -> None:
    """From 8 KiB to 16 MiB, with and without residual and norm."""
    command = [sys.executable, str(SCRIPT), "--features", str(features), "--check-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@two_gpus
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
