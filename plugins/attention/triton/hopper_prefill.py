"""Launches the Hopper prefill kernel, in place of ``prefill`` for the specs that it supports."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.plugins.attention.triton.hopper_prefill_kernel import BLOCK_N, hopper_prefill_kernel
from quire.plugins.attention.triton.hopper_tile_scheduler import BLOCK_M
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV
from quire.sdk.ops import DeviceProfile

__all__ = ["HopperPrefill", "make_page_descriptor"]


class HopperPrefill:
    """Prefill of one group of layers on a GPU of compute capability 9.0."""

    def __init__(self, spec: AttentionSpec, device: torch.device, num_sms: int) -> None:
        self._spec = spec
        self._num_sms = num_sms
        self._tile_counter = torch.zeros(1, dtype=torch.int32, device=device)

    @classmethod
    def create_if_supported(cls, spec: AttentionSpec, device: torch.device) -> HopperPrefill | None:
        """None where ``spec`` or the GPU needs the general kernel."""
        profile = DeviceProfile.detect(device)
        return cls(spec, device, profile.num_sms) if profile.is_hopper and cls.supports(spec) else None

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """Full causal attention in 16 bits, ``head_dim`` 64 or 128, blocks of 8 to 128 tokens, no soft-cap."""
        return (
            spec.dtype in (torch.bfloat16, torch.float16)
            and spec.kv_dtype == spec.dtype
            and spec.qk_head_dim == spec.v_head_dim
            and spec.qk_head_dim in (64, 128)
            and spec.block_size in (8, 16, 32, 64, 128)
            and spec.kind == "full"
            and spec.softcap is None
        )

    def launch(self, batch: AttentionBatch, q: Tensor, kv: LayerKV, out: Tensor, lse_out: Tensor | None) -> None:
        """Attend for the requests after the decodes. Tensors as in ``AttentionBackend.run``."""
        spec = self._spec
        num_reqs = batch.num_reqs - batch.num_decodes
        num_tokens = batch.num_tokens - batch.num_decodes * batch.decode_query_len
        group_size = spec.num_heads // spec.num_kv_heads
        num_tiles = spec.num_kv_heads * (num_tokens * group_size // BLOCK_M.value + num_reqs)
        hopper_prefill_kernel[(min(num_tiles, self._num_sms),)](
            q,
            make_page_descriptor(kv.k),
            make_page_descriptor(kv.v),
            out,
            out if lse_out is None else lse_out,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            self._tile_counter,
            batch.num_decodes,
            batch.num_reqs,
            batch.block_table.stride(0),
            num_tiles,
            kv.k.stride(0) // kv.k.stride(2),
            kv.k.stride(1) // kv.k.stride(2),
            kv.v.stride(0) // kv.v.stride(2),
            kv.v.stride(1) // kv.v.stride(2),
            q_stride_token=q.stride(0),
            q_stride_head=q.stride(1),
            out_stride_token=out.stride(0),
            out_stride_head=out.stride(1),
            has_lse=lse_out is not None,
            num_heads=spec.num_heads,
            group_size=group_size,
            block_size=spec.block_size,
            head_dim=spec.qk_head_dim,
            softmax_scale=spec.scale,
            num_warps=4,
            maxnreg=168,  # of 384 threads; setmaxnreg deals them out anew inside
        )


def make_page_descriptor(cache: Tensor) -> TensorDescriptor:
    """A TMA descriptor of one layer's K or V (num_blocks, num_kv_heads, block_size, head_dim), as a matrix with a slot
    in each row, of which a box is one page of one head.

    Rows lie ``stride(2)`` apart; those between the pages of one layer are other layers'.
    """
    num_blocks, num_heads, block_size, head_dim = cache.shape
    num_rows = (num_blocks - 1) * (cache.stride(0) // cache.stride(2)) + num_heads * block_size
    layout = NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    assert block_size <= BLOCK_N.value and cache.stride(1) == block_size * cache.stride(2), "a head-major layout"
    return TensorDescriptor(cache, [num_rows, head_dim], [cache.stride(2), 1], [block_size, head_dim], layout)
