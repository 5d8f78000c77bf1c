"""Paged attention on one GPU: decode and prefill beside FlashAttention-3 and the roofline bound.

    PYTHONPATH=src python benchmarks/kernels/attention.py [decode] [prefill] [skewed] [fp8] [verify]

Each figure is one layer's: a CUDA graph prepares the step's metadata once and then runs every layer of a pool laid out
as the engine's, so that no layer finds its keys in the L2 cache. Data are random, block tables too. The bound counts
bytes at the read bandwidth, or operations at the bf16 rate, measured on the same kind of card.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.server.bench.workloads import make_workload

READ_BANDWIDTH = 4.29e12
"""Bytes a second, H200."""
BF16_FLOPS = 680e12
"""bf16 operations a second, H200."""
BLOCK_SIZE = 16
POOL_BYTES = 48 << 30

# FlashAttention-3 as vLLM 0.20.2 calls it on an H200, 32 query and 8 KV heads, head_dim 128, blocks of 16.
FA3_DECODE = {(1, 1024): 10.45, (1, 4096): 12.84, (32, 1024): 42.17, (32, 4096): 135.73, (256, 1024): 292.2}
FA3_DECODE |= {(256, 4096): 1027.43}  # (batch, context): microseconds
FA3_PREFILL = {(1, 2048, 2048): 77.17, (4, 4096, 4096): 1059.24, (1, 2048, 8192): 427.38}  # (batch, new, context)

FP8_SHAPES = ((1, 1024), (1, 4096), (32, 1024), (64, 300), (128, 150), (256, 150), (256, 256), (256, 800), (256, 4096))


class MemoryPool:
    """Random memory, from which each measurement takes its KV cache."""

    def __init__(self, num_bytes: int = POOL_BYTES) -> None:
        self.device = torch.device("cuda")
        self._raw = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=self.device).normal_().view(torch.uint8)

    def make_step(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        make_backend: Callable[..., AttentionBackend],
        decode_query_len: int = 1,
    ) -> tuple[Callable[[], None], int]:
        """(function that runs a step over every layer, number of layers)."""
        device = self.device
        num_blocks_of = [-(-seq_len // BLOCK_SIZE) for seq_len in seq_lens]
        num_blocks = sum(num_blocks_of) + 1  # the null block
        backend = make_backend(spec, device)
        max_seq_len = max(4096, max(seq_lens))
        backend.allocate_workspaces(AttentionLimits(max(256, len(seq_lens)), max_seq_len, device, decode_query_len))
        layer_bytes = backend.kv_layout().bytes_per_block
        num_layers = min(
            max(8, -(-(256 << 20) // (num_blocks * layer_bytes))), len(self._raw) // (num_blocks * layer_bytes), 256
        )
        raw = self._raw[: num_blocks * num_layers * layer_bytes].view(num_blocks, num_layers * layer_bytes)
        kv_caches = [
            backend.kv_layout().view(raw[:, i * layer_bytes : (i + 1) * layer_bytes]) for i in range(num_layers)
        ]
        if spec.kv_dtype.itemsize == 1:
            for kv in kv_caches:
                kv.k_scale = kv.v_scale = torch.ones(1, device=device)
        max_blocks = max(-(-max_seq_len // BLOCK_SIZE), max(num_blocks_of))
        block_table = torch.zeros(len(seq_lens), max_blocks, dtype=torch.int32)
        random_blocks, used = torch.randperm(num_blocks - 1) + 1, 0
        for request, count in enumerate(num_blocks_of):
            block_table[request, :count] = random_blocks[used : used + count]
            used += count
        batch = AttentionBatch(
            query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=block_table.to(device),
            num_reqs=len(seq_lens),
            num_tokens=sum(query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max_seq_len,
            num_decodes=sum(query_len == decode_query_len for query_len in query_lens),
            decode_query_len=decode_query_len,
        )
        num_heads, num_kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.qk_head_dim
        qkv = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, device=device).bfloat16()
        q, out = qkv[:, :num_heads], torch.empty(len(qkv), num_heads, head_dim, dtype=torch.bfloat16, device=device)

        def run_step() -> None:
            backend.prepare_metadata(batch)
            for layer, kv in enumerate(kv_caches):
                backend.run(layer, q, kv, out)

        return run_step, num_layers


def time_graph(run: Callable[[], None], repeats: int = 9) -> float:
    """Median seconds of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def make_spec(
    num_heads: int, num_kv_heads: int = 8, head_dim: int = 128, kv_dtype: torch.dtype = torch.bfloat16
) -> AttentionSpec:
    """bf16 queries, full attention."""
    types: dict[str, Any] = {"dtype": torch.bfloat16, "kv_dtype": kv_dtype, "block_size": BLOCK_SIZE}
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        **types,
    )


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
    run_step, num_layers = pool.make_step(spec, [query_len] * len(seq_lens), seq_lens, make_backend, query_len)
    seconds = time_graph(run_step) / num_layers
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
    run_step, num_layers = pool.make_step(spec, [query_len] * num_reqs, [seq_len] * num_reqs, make_backend)
    seconds = time_graph(run_step, 5) / num_layers
    num_pairs = num_reqs * (query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2)
    flops = 4 * num_pairs * num_heads * spec.qk_head_dim
    fa3 = FA3_PREFILL.get((num_reqs, query_len, seq_len)) if num_heads == 32 else None
    comparison = "" if fa3 is None else f"  FA3 {fa3:8.2f} us  {fa3 * 1e-6 / seconds:.0%}"
    print(
        f"prefill {num_heads:2}/8 {num_reqs:3} x {query_len:5} of {seq_len:5} {seconds * 1e6:9.2f} us"
        f" {flops / seconds / 1e12:6.0f} TFLOP/s {flops / BF16_FLOPS / seconds:6.1%} of the bound{comparison}",
        flush=True,
    )


def main(tables: Sequence[str]) -> None:
    """Print the tables named, or all."""
    pool = MemoryPool()
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
