"""One attention step over many layers, whose keys and values lie in a pool as the engine lays them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec, GraphKey
from quire.server.plugin_bench.timer import L2_BYTES

__all__ = ["POOL_BYTES", "AttentionStep", "MemoryPool"]

POOL_BYTES = 48 << 30
"""Of the one pool of a process on a GPU that has so much: where in memory keys lie changes a short step's time by some
percent, so all that is compared lies in one pool."""
_MAX_LAYERS = 256
_MIN_LAYERS = 8
_ON_CPU = 1


@dataclass(frozen=True)
class AttentionStep:
    """A step: its metadata is prepared once, and then every layer runs."""

    run: Callable[[], None]
    num_layers: int


class MemoryPool:
    """Random memory, from which each measurement takes its KV cache."""

    def __init__(self, num_bytes: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self._raw = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device).normal_().view(torch.uint8)

    def make_step(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        make_backend: Callable[..., AttentionBackend],
        decode_query_len: int = 1,
        key: GraphKey | None = None,
    ) -> AttentionStep:
        """A step of requests with so many queries each, whose contexts have these lengths with them; decodes come
        first. ``key``: as in a CUDA graph of that kind."""
        device, block_size = self.device, spec.block_size
        num_blocks_of = [-(-seq_len // block_size) for seq_len in seq_lens]
        num_blocks = sum(num_blocks_of) + 1  # the null block
        backend = make_backend(spec, device)
        max_seq_len = max(4096, max(seq_lens))
        backend.allocate_workspaces(AttentionLimits(max(256, len(seq_lens)), max_seq_len, device, decode_query_len))
        layout = backend.kv_layout()
        layer_bytes = layout.bytes_per_block
        wanted = max(_MIN_LAYERS, -(-L2_BYTES // (num_blocks * layer_bytes))) if device.type == "cuda" else _ON_CPU
        num_layers = min(wanted, len(self._raw) // (num_blocks * layer_bytes), _MAX_LAYERS)
        assert num_layers, f"a pool of {len(self._raw)} bytes does not hold {num_blocks} blocks"
        raw = self._raw[: num_blocks * num_layers * layer_bytes].view(num_blocks, num_layers * layer_bytes)
        kv_caches = [layout.view(raw[:, i * layer_bytes : (i + 1) * layer_bytes]) for i in range(num_layers)]
        if spec.kv_dtype.itemsize == 1:
            for kv in kv_caches:
                kv.k_scale = kv.v_scale = torch.ones(1, device=device)
        max_blocks = max(-(-max_seq_len // block_size), max(num_blocks_of))
        block_table = torch.zeros(len(seq_lens), max_blocks, dtype=torch.int32)
        same_for_all = torch.Generator().manual_seed(0)
        random_blocks, used = torch.randperm(num_blocks - 1, generator=same_for_all) + 1, 0
        for request, count in enumerate(num_blocks_of):
            block_table[request, :count] = random_blocks[used : used + count]
            used += count
        num_decodes = sum(query_len == decode_query_len for query_len in query_lens)
        batch = AttentionBatch(
            query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=block_table.to(device),
            num_reqs=len(seq_lens),
            num_tokens=sum(query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max_seq_len,
            num_decodes=num_decodes,
            decode_query_len=decode_query_len,
        )
        num_heads, num_kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.qk_head_dim
        qkv = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, device=device).to(spec.dtype)
        q, out = qkv[:, :num_heads], torch.empty(len(qkv), num_heads, head_dim, dtype=spec.dtype, device=device)
        step_kv = {}
        if backend.writes_kv:
            step_kv = {"k": qkv[:, num_heads : num_heads + num_kv_heads], "v": qkv[:, num_heads + num_kv_heads :]}

        def run_step() -> None:
            if key is None:
                backend.prepare_metadata(batch)
            else:
                backend.prepare_metadata(batch, key)
            for layer, kv in enumerate(kv_caches):
                backend.run(layer, q, kv, out, **step_kv)

        return AttentionStep(run_step, num_layers)
