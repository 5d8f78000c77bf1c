"""Paged attention on one GPU: decode and prefill beside FlashAttention-3 and the roofline bound.

    PYTHONPATH=src python benchmarks/kernels/attention.py [decode] [prefill] [skewed] [fp8] [verify]
    PYTHONPATH=src python benchmarks/kernels/attention.py agreement FILE.json

The second measures the shapes of ``quire plugins bench attention/triton --json`` again and says how far apart they are.

Each figure is one layer's: a CUDA graph prepares the step's metadata once and then runs every layer of a pool laid out
as the engine's, so that no layer finds its keys in the L2 cache. Data are random, block tables too. The bound counts
bytes at the read bandwidth, or operations at the bf16 rate, measured on the same kind of card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend
from quire.plugins.attention.triton.backend import TritonBackend
from quire.server.bench.workloads import make_workload
from quire.server.plugin_bench.attention_bench import AttentionBench, StepShape, make_spec
from quire.server.plugin_bench.attention_step import POOL_BYTES, MemoryPool
from quire.server.plugin_bench.measurement import measure_case
from quire.server.plugin_bench.timer import time_graph

READ_BANDWIDTH = 4.29e12
"""Bytes a second, H200."""
BF16_FLOPS = 680e12
"""bf16 operations a second, H200."""
AGREEMENT_ROUNDS = 7

# FlashAttention-3 as vLLM 0.20.2 calls it on an H200, 32 query and 8 KV heads, head_dim 128, blocks of 16.
FA3_DECODE = {(1, 1024): 10.45, (1, 4096): 12.84, (32, 1024): 42.17, (32, 4096): 135.73, (256, 1024): 292.2}
FA3_DECODE |= {(256, 4096): 1027.43}  # (batch, context): microseconds
FA3_PREFILL = {(1, 2048, 2048): 77.17, (4, 4096, 4096): 1059.24, (1, 2048, 8192): 427.38}  # (batch, new, context)

FP8_SHAPES = ((1, 1024), (1, 4096), (32, 1024), (64, 300), (128, 150), (256, 150), (256, 256), (256, 800), (256, 4096))


def measure_decode(
    pool: MemoryPool,
    num_heads: int,
    seq_lens: Sequence[int],
    name: str,
    fa3: float | None = None,
    make_backend: Callable[..., AttentionBackend] = TritonBackend,
    query_len: int = 1,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Print one decode step: microseconds, bandwidth, share of the bound, FlashAttention-3's microseconds."""
    spec = make_spec(num_heads, kv_dtype=kv_dtype)
    step = pool.make_step(spec, [query_len] * len(seq_lens), seq_lens, make_backend, query_len)
    seconds = time_graph(step.run, step.num_layers)
    num_bytes = sum(seq_lens) * spec.num_kv_heads * spec.kv_dtype.itemsize + query_len * len(seq_lens) * num_heads * 2
    num_bytes *= 2 * spec.qk_head_dim
    comparison = "" if fa3 is None else f"  FA3 {fa3:8.2f} us  x{fa3 * 1e-6 / seconds:.2f}"
    print(
        f"{'decode' if query_len == 1 else f'verify {query_len}'} {num_heads:2}/8 {name:>28} {seconds * 1e6:9.2f} us"
        f" {num_bytes / seconds / 1e9:6.0f} GB/s {num_bytes / READ_BANDWIDTH / seconds:6.1%} of the bound{comparison}",
        flush=True,
    )


def get_nano_seq_lens(num_steps: int) -> list[int]:
    """Context lengths of the ``nano`` workload's requests that still run after ``num_steps`` decode steps."""
    workload = make_workload("nano")
    return [
        len(prompt) + num_steps + 1
        for prompt, max_tokens in zip(workload.prompts, workload.max_tokens, strict=True)
        if max_tokens > num_steps
    ]


def measure_prefill(
    pool: MemoryPool,
    num_heads: int,
    num_reqs: int,
    query_len: int,
    seq_len: int,
    make_backend: Callable[..., AttentionBackend] = TritonBackend,
) -> None:
    """Print one step of prompts: microseconds, TFLOP/s of the causal half, share of the bound, FlashAttention-3's."""
    spec = make_spec(num_heads)
    step = pool.make_step(spec, [query_len] * num_reqs, [seq_len] * num_reqs, make_backend)
    seconds = time_graph(step.run, step.num_layers, 5)
    num_pairs = num_reqs * (query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2)
    flops = 4 * num_pairs * num_heads * spec.qk_head_dim
    fa3 = FA3_PREFILL.get((num_reqs, query_len, seq_len)) if num_heads == 32 else None
    comparison = "" if fa3 is None else f"  FA3 {fa3:8.2f} us  {fa3 * 1e-6 / seconds:.0%}"
    print(
        f"prefill {num_heads:2}/8 {num_reqs:3} x {query_len:5} of {seq_len:5} {seconds * 1e6:9.2f} us"
        f" {flops / seconds / 1e12:6.0f} TFLOP/s {flops / BF16_FLOPS / seconds:6.1%} of the bound{comparison}",
        flush=True,
    )


def measure_agreement(document: Mapping[str, Any]) -> None:
    """Print each case of ``quire plugins bench attention/triton`` as this script measures it, beside the bench in turns
    with it and in the same pool, and beside the figure in ``document``, which another process measured before. Each
    round makes its step and its graph anew: those have some modes that differ by percents, so means are compared."""
    printed = {row["case"]: row["microseconds"] for row in document["rows"] if row["implementation"] == "triton"}
    bench = AttentionBench(torch.device("cuda"))
    largest = {"by turns": 0.0, "in its own process": 0.0}
    for case in bench.list_cases(TritonBackend):
        shape: StepShape = case.parameters
        ours, theirs = [], []
        for _ in range(AGREEMENT_ROUNDS):
            step = bench.pool.make_step(bench.spec, shape.query_lens, shape.seq_lens, TritonBackend)
            ours.append(1e6 * time_graph(step.run, step.num_layers))
            (measured,) = measure_case(bench, case, {"triton": TritonBackend}, num_rounds=3)
            assert measured.microseconds is not None, measured.refused
            theirs.append(measured.microseconds)
        line = f"{case.name:>28} {fmean(ours):9.2f} us ({_format_spread(ours)}), plugins bench"
        for where, figure in zip(largest, (fmean(theirs), printed[case.name]), strict=True):
            difference = figure / fmean(ours) - 1
            line += f" {figure:9.2f} us ({difference:+6.2%}) {where}"
            largest[where] = max(largest[where], abs(difference))
        print(f"{line}, spread {_format_spread(theirs)}", flush=True)
    print("largest difference", ", ".join(f"{share:.2%} {where}" for where, share in largest.items()))


def _format_spread(figures: Sequence[float]) -> str:
    return f"{max(figures) / min(figures) - 1:.1%}"


def main(tables: Sequence[str]) -> None:
    """Print the tables named, or all."""
    if tables[:1] == ["agreement"]:
        return measure_agreement(json.loads(Path(tables[1]).read_text()))
    pool = MemoryPool(POOL_BYTES, torch.device("cuda"))
    tables = tables or ("decode", "skewed", "fp8", "verify", "prefill")
    if "decode" in tables:
        for heads in (16, 32):
            for batch in (1, 32, 256):
                for context in (128, 384, 1024, 4096):
                    fa3 = FA3_DECODE.get((batch, context)) if heads == 32 else None
                    measure_decode(pool, heads, [context] * batch, f"{batch} x {context}", fa3)
    if "skewed" in tables:
        for heads in (16, 32):
            for steps in (50, 200, 400, 600, 800, 950):
                lengths = get_nano_seq_lens(steps)
                measure_decode(pool, heads, lengths, f"nano, {len(lengths)} left")
        measure_decode(pool, 32, [2100] * 64, "64 x 2100")
        measure_decode(pool, 32, [32768] + [256] * 63, "1 x 32k + 63 x 256")
        measure_decode(pool, 32, [32768] + [1024] * 255, "1 x 32k + 255 x 1k")
    if "fp8" in tables:  # an FP8 cache beside a bf16 one
        shapes = {f"{n} x {length}": [length] * n for n, length in FP8_SHAPES}
        shapes |= {f"nano, {len(lengths)} left": lengths for lengths in map(get_nano_seq_lens, (50, 400, 800))}
        for name, lengths in shapes.items():
            for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
                measure_decode(pool, 32, lengths, f"{name}, {str(kind)[6:]}", kv_dtype=kind)
    if "verify" in tables:
        for heads in (16, 32):
            for lengths in ([1024], [4096], [1024] * 32, [1024] * 256):
                for query_len in (1, 3, 5, 9):
                    measure_decode(pool, heads, lengths, f"{len(lengths)} x {lengths[0]}", query_len=query_len)
    if "prefill" in tables:
        for heads in (16, 32):
            for batch, new, context in (
                (1, 512, 512),
                (16, 512, 512),
                (1, 2048, 2048),
                (4, 4096, 4096),
                (1, 2048, 8192),
                (64, 2048, 2048),
            ):
                measure_prefill(pool, heads, batch, new, context)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
