"""Attention of prompts on Hopper: ``prefill`` for what its kernel of its own can do, with less waiting."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.plugins.attention.triton.hopper_prefill_kernel import KEYS, ROWS, hopper_kernel
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV

__all__ = ["HopperPrefill", "page_rows"]


class HopperPrefill:
    """Prompts of one group of layers on a GPU of capability 9.0."""

    def __init__(self, spec: AttentionSpec, device: torch.device, programs: int = 132) -> None:
        self._spec = spec
        self._programs = programs
        self._drawn = torch.zeros(1, dtype=torch.int32, device=device)

    @classmethod
    def on(cls, spec: AttentionSpec, device: torch.device) -> HopperPrefill | None:
        """None where ``spec`` or the GPU wants the general kernel."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or not cls.knows(spec):
            return None
        return cls(spec, device, torch.cuda.get_device_properties(device).multi_processor_count)

    @staticmethod
    def knows(spec: AttentionSpec) -> bool:
        """Plain causal attention in 16 bits, heads of 64 or 128 features, pages of 8 to 128 tokens."""
        return (
            spec.dtype in (torch.bfloat16, torch.float16)
            and spec.kv_dtype == spec.dtype
            and spec.qk_head_dim == spec.v_head_dim
            and spec.qk_head_dim in (64, 128)
            and spec.block_size in (8, 16, 32, 64, 128)
            and spec.kind == "full"
            and spec.softcap is None
        )

    def run(self, batch: AttentionBatch, q: Tensor, kv: LayerKV, out: Tensor, lse_out: Tensor | None) -> None:
        """Attend for the requests after the decodes. Tensors as in ``AttentionBackend.run``."""
        spec = self._spec
        requests = batch.num_reqs - batch.num_decodes
        tokens = batch.num_tokens - batch.num_decodes * batch.decode_query_len
        group = spec.num_heads // spec.num_kv_heads
        tiles = spec.num_kv_heads * (tokens * group // ROWS.value + requests)
        hopper_kernel[(min(tiles, self._programs),)](
            q,
            page_rows(kv.k),
            page_rows(kv.v),
            out,
            out if lse_out is None else lse_out,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            self._drawn,
            batch.num_decodes,
            batch.num_reqs,
            batch.block_table.stride(0),
            tiles,
            kv.k.stride(0) // kv.k.stride(2),
            kv.k.stride(1) // kv.k.stride(2),
            kv.v.stride(0) // kv.v.stride(2),
            kv.v.stride(1) // kv.v.stride(2),
            q_token=q.stride(0),
            q_head=q.stride(1),
            out_token=out.stride(0),
            out_head=out.stride(1),
            has_lse=lse_out is not None,
            heads=spec.num_heads,
            group=group,
            page=spec.block_size,
            dim=spec.qk_head_dim,
            scale=spec.scale,
            num_warps=4,
            maxnreg=168,  # of 384 threads; they are dealt out anew inside
        )


def page_rows(cache: Tensor) -> TensorDescriptor:
    """Every slot of a cache of heads (num_blocks, kv_heads, page, dim) as a row (dim,), to be copied a page at a time.

    Rows lie ``stride(2)`` apart; those between the heads of one layer are other layers'.
    """
    blocks, heads, page, dim = cache.shape
    rows = (blocks - 1) * (cache.stride(0) // cache.stride(2)) + heads * page
    layout = NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    assert page <= KEYS.value and cache.stride(1) == page * cache.stride(2), "a layout of whole heads"
    return TensorDescriptor(cache, [rows, dim], [cache.stride(2), 1], [page, dim], layout)
