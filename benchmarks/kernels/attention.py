"""Paged attention on one GPU: decode and prefill beside FlashAttention-3 and the floor.

    PYTHONPATH=src python benchmarks/kernels/attention.py [decode] [prefill] [skewed] [fp8] [verify]

Each figure is one layer's: a CUDA graph runs the step's plan once and then every layer of a pool laid out as the
engine's, so that no layer finds its keys in the L2 cache. Data are random, block tables too. The floor counts bytes
at the read bandwidth, or operations at the bf16 rate, measured on the same kind of card.
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

READ = 4.29e12
"""Bytes a second, H200."""
BF16 = 680e12
"""bf16 operations a second, H200."""
PAGE = 16
POOL = 48 << 30

# FlashAttention-3 as vLLM 0.20.2 calls it on an H200, 32 query and 8 KV heads, dim 128, pages of 16.
FA3_DECODE = {(1, 1024): 10.45, (1, 4096): 12.84, (32, 1024): 42.17, (32, 4096): 135.73, (256, 1024): 292.2}
FA3_DECODE |= {(256, 4096): 1027.43}  # (batch, context): microseconds
FA3_PREFILL = {(1, 2048, 2048): 77.17, (4, 4096, 4096): 1059.24, (1, 2048, 8192): 427.38}  # (batch, new, context)

FP8 = ((1, 1024), (1, 4096), (32, 1024), (64, 300), (128, 150), (256, 150), (256, 256), (256, 800), (256, 4096))


class Pool:
    """Random memory that every shape cuts its cache from."""

    def __init__(self, size: int = POOL) -> None:
        self.device = torch.device("cuda")
        self._raw = torch.empty(size // 2, dtype=torch.bfloat16, device=self.device).normal_().view(torch.uint8)

    def step(
        self,
        spec: AttentionSpec,
        queries: Sequence[int],
        lengths: Sequence[int],
        make: Callable[..., AttentionBackend],
        decode_query_len: int = 1,
    ) -> tuple[Callable[[], None], int]:
        """(what runs a step over every layer, number of layers) for requests of so many queries and lengths."""
        device = self.device
        pages = [-(-length // PAGE) for length in lengths]
        blocks = sum(pages) + 1
        backend = make(spec, device)
        limit = max(4096, max(lengths))
        backend.allocate_workspaces(AttentionLimits(max(256, len(lengths)), limit, device, decode_query_len))
        size = backend.kv_layout().bytes_per_block
        layers = min(max(8, -(-(256 << 20) // (blocks * size))), len(self._raw) // (blocks * size), 256)
        rows = self._raw[: blocks * layers * size].view(blocks, layers * size)
        kvs = [backend.kv_layout().view(rows[:, i * size : (i + 1) * size]) for i in range(layers)]
        if spec.kv_dtype.itemsize == 1:
            for kv in kvs:
                kv.k_scale = kv.v_scale = torch.ones(1, device=device)
        table = torch.zeros(len(lengths), max(-(-limit // PAGE), max(pages)), dtype=torch.int32)
        order, at = torch.randperm(blocks - 1) + 1, 0
        for row, count in enumerate(pages):
            table[row, :count] = order[at : at + count]
            at += count
        starts = torch.tensor([0, *queries]).cumsum(0)
        decodes = sum(count == decode_query_len for count in queries)
        batch = AttentionBatch(
            query_start_loc=starts.int().to(device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=table.to(device),
            num_reqs=len(lengths),
            num_tokens=sum(queries),
            max_query_len=max(queries),
            max_seq_len=limit,
            num_decodes=decodes,
            decode_query_len=decode_query_len,
        )
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.qk_head_dim
        qkv = torch.randn(sum(queries), heads + 2 * kv_heads, dim, device=device).bfloat16()
        q, out = qkv[:, :heads], torch.empty(sum(queries), heads, dim, dtype=torch.bfloat16, device=device)

        def run() -> None:
            backend.prepare_metadata(batch)
            for layer, kv in enumerate(kvs):
                backend.run(layer, q, kv, out)

        return run, layers


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


def spec_of(heads: int, kv_heads: int = 8, dim: int = 128, kv_dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    """bf16 queries, full attention."""
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "kv_dtype": kv_dtype, "block_size": PAGE, "scale": dim**-0.5}
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, qk_head_dim=dim, v_head_dim=dim, **kinds)


def decode_line(
    pool: Pool,
    heads: int,
    lengths: Sequence[int],
    name: str,
    fa3: float | None = None,
    make: Callable[..., AttentionBackend] = TritonBackend,
    queries: int = 1,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One decode step: microseconds, bandwidth, share of the floor, FlashAttention-3's microseconds."""
    spec = spec_of(heads, kv_dtype=kv_dtype)
    run, layers = pool.step(spec, [queries] * len(lengths), lengths, make, queries)
    seconds = time_graph(run) / layers
    moved = sum(lengths) * spec.num_kv_heads * spec.kv_dtype.itemsize + queries * len(lengths) * heads * 2
    moved *= 2 * spec.qk_head_dim
    beside = "" if fa3 is None else f"  FA3 {fa3:8.2f} us  x{fa3 * 1e-6 / seconds:.2f}"
    print(
        f"{'decode' if queries == 1 else f'verify {queries}'} {heads:2}/8 {name:>28} {seconds * 1e6:9.2f} us"
        f" {moved / seconds / 1e9:6.0f} GB/s {moved / READ / seconds:6.1%} of the floor{beside}",
        flush=True,
    )


def nano_lengths(steps: int) -> list[int]:
    """Contexts of the ``nano`` workload's requests that still run after so many decode steps."""
    work = make_workload("nano")
    return [len(prompt) + steps + 1 for prompt, most in zip(work.prompts, work.max_tokens, strict=True) if most > steps]


def prefill_line(
    pool: Pool,
    heads: int,
    batch: int,
    new: int,
    context: int,
    make: Callable[..., AttentionBackend] = TritonBackend,
) -> None:
    """One step of prompts: microseconds, TFLOP/s of the causal half, share of the floor, FlashAttention-3's."""
    spec = spec_of(heads)
    run, layers = pool.step(spec, [new] * batch, [context] * batch, make)
    seconds = time_graph(run, 5) / layers
    pairs = batch * (new * (context - new) + new * (new + 1) // 2)
    flops = 4 * pairs * heads * spec.qk_head_dim
    fa3 = FA3_PREFILL.get((batch, new, context)) if heads == 32 else None
    beside = "" if fa3 is None else f"  FA3 {fa3:8.2f} us  {fa3 * 1e-6 / seconds:.0%}"
    print(
        f"prefill {heads:2}/8 {batch:3} x {new:5} of {context:5} {seconds * 1e6:9.2f} us"
        f" {flops / seconds / 1e12:6.0f} TFLOP/s {flops / BF16 / seconds:6.1%} of the floor{beside}",
        flush=True,
    )


def main(wanted: Sequence[str]) -> None:
    """Print the tables named, or all."""
    pool = Pool()
    wanted = wanted or ("decode", "skewed", "fp8", "verify", "prefill")
    if "decode" in wanted:
        for heads in (16, 32):
            for batch in (1, 32, 256):
                for context in (128, 384, 1024, 4096):
                    fa3 = FA3_DECODE.get((batch, context)) if heads == 32 else None
                    decode_line(pool, heads, [context] * batch, f"{batch} x {context}", fa3)
    if "skewed" in wanted:
        for heads in (16, 32):
            for steps in (50, 200, 400, 600, 800, 950):
                lengths = nano_lengths(steps)
                decode_line(pool, heads, lengths, f"nano, {len(lengths)} left")
        decode_line(pool, 32, [2100] * 64, "64 x 2100")
        decode_line(pool, 32, [32768] + [256] * 63, "1 x 32k + 63 x 256")
        decode_line(pool, 32, [32768] + [1024] * 255, "1 x 32k + 255 x 1k")
    if "fp8" in wanted:  # an FP8 cache beside a bf16 one
        shapes = {f"{n} x {length}": [length] * n for n, length in FP8}
        shapes |= {f"nano, {len(lengths)} left": lengths for lengths in map(nano_lengths, (50, 400, 800))}
        for name, lengths in shapes.items():
            for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
                decode_line(pool, 32, lengths, f"{name}, {str(kind)[6:]}", kv_dtype=kind)
    if "verify" in wanted:
        for heads in (16, 32):
            for lengths in ([1024], [4096], [1024] * 32, [1024] * 256):
                for queries in (1, 3, 5, 9):
                    decode_line(pool, heads, lengths, f"{len(lengths)} x {lengths[0]}", queries=queries)
    if "prefill" in wanted:
        for heads in (16, 32):
            for batch, new, context in (
                (1, 512, 512),
                (16, 512, 512),
                (1, 2048, 2048),
                (4, 4096, 4096),
                (1, 2048, 8192),
                (64, 2048, 2048),
            ):
                prefill_line(pool, heads, batch, new, context)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
