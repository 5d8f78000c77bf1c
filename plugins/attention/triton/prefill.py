"""Paged prefill for any GPU: FlashAttention-2 over query tiles of prompts' chunks.

1. A query tile is ``block_m`` consecutive GQA-packed rows of one request and one KV head, row = (token, head of the
   group), so that each K and V tile is read once for the whole group.
2. Per tile of ``block_n`` keys, gathered through the block table: S = Q K^T, online softmax, O += P V (Dao, 2023,
   arXiv:2307.08691). Key tiles below the diagonal need no causal mask and come first, then those that do.
3. Request i's tiles begin at index ``(tokens before it) * group_size // block_m + i``: an upper bound that depends on
   ``query_start_loc`` alone, so that the grid is known on the host and a program finds its request by bisection.

Grid: (num_kv_heads, query tiles at most). Programs without rows end at once.
Memory traffic: K and V of a request once for each of its query tiles and KV heads, mostly from the L2 cache; Q and the
output once. Prompts are bound by the tensor cores: 4 * head_dim operations a row and key.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.attention.triton.fp8 import prepare_fp8_queries
from quire.plugins.attention.triton.online_softmax import LN2, normalize_rows, scale_scores
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV
from quire.sdk.ops import DeviceProfile

__all__ = ["launch_prefill"]

_BYTES_OF_TILE_256 = 104 * 1024
"""Shared memory that the tile for heads of 256 takes: more than Ada (99 KiB) has."""


def launch_prefill(
    spec: AttentionSpec, batch: AttentionBatch, q: Tensor, kv: LayerKV, out: Tensor, lse_out: Tensor | None
) -> None:
    """Attend for the requests after the decodes. Tensors as in ``AttentionBackend.run``."""
    constants, options = _build_constants(spec, DeviceProfile.detect(q.device).shared_memory)
    num_reqs = batch.num_reqs - batch.num_decodes
    num_tokens = batch.num_tokens - batch.num_decodes * batch.decode_query_len
    group_size = spec.num_heads // spec.num_kv_heads
    grid = (spec.num_kv_heads, num_tokens * group_size // constants["block_m"] + num_reqs)
    _prefill_kernel[grid](
        q,
        kv.k,
        kv.v,
        out,
        out if lse_out is None else lse_out,
        batch.seq_lens if kv.k_scale is None else kv.k_scale,
        batch.seq_lens if kv.v_scale is None else kv.v_scale,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.num_decodes,
        batch.num_reqs,
        batch.block_table.stride(0),
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_block=kv.k.stride(0),
        k_stride_head=kv.k.stride(1),
        k_stride_slot=kv.k.stride(2),
        v_stride_block=kv.v.stride(0),
        v_stride_head=kv.v.stride(1),
        v_stride_slot=kv.v.stride(2),
        out_stride_token=out.stride(0),
        out_stride_head=out.stride(1),
        has_lse=lse_out is not None,
        is_fp8=kv.k.dtype.itemsize == 1,
        **constants,
        **options,
    )


def _build_constants(spec: AttentionSpec, shared_memory: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(compile-time constants, launch options) for ``spec``, on a GPU with so many bytes of shared memory a program."""
    is_float32 = spec.dtype == torch.float32
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    # (block_m, block_n, num_warps, num_stages): what compiles without spills (tests/aot). float32 has no tensor cores.
    half_tiles = {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)}
    if shared_memory < _BYTES_OF_TILE_256:
        half_tiles[256] = (64, 32, 8, 2)
    float32_tiles = {64: (32, 32, 4, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)}
    block_m, block_n, num_warps, num_stages = (float32_tiles if is_float32 else half_tiles)[dim]
    constants: dict[str, Any] = {
        "num_heads": spec.num_heads,
        "group_size": spec.num_heads // spec.num_kv_heads,
        "block_size": spec.block_size,
        "head_dim": spec.qk_head_dim,
        "head_dim_padded": triton.next_power_of_2(max(spec.qk_head_dim, 16)),
        "v_head_dim": spec.v_head_dim,
        "v_head_dim_padded": triton.next_power_of_2(max(spec.v_head_dim, 16)),
        "softmax_scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "block_m": block_m,
        "block_n": block_n,
        "input_precision": "ieee" if is_float32 else "tf32",
    }
    return constants, {"num_warps": num_warps, "num_stages": num_stages}


@triton.jit(do_not_specialize=["num_decodes", "num_reqs", "table_stride"])
def _prefill_kernel(
    q_ptr,  # (num_tokens, num_heads, head_dim)
    k_ptr,  # (num_blocks, num_kv_heads, block_size, head_dim), any strides
    v_ptr,
    out_ptr,  # (num_tokens, num_heads, v_head_dim)
    lse_ptr,  # (num_tokens, num_heads) float32
    k_scale_ptr,  # (1,) float32, where the cache is FP8
    v_scale_ptr,
    block_table_ptr,  # (num_reqs, max_blocks) int32
    seq_lens_ptr,  # (num_reqs,) int32
    query_start_ptr,  # (num_reqs + 1,) int32
    num_decodes,
    num_reqs,
    table_stride,
    q_stride_token: tl.constexpr,
    q_stride_head: tl.constexpr,
    k_stride_block: tl.constexpr,
    k_stride_head: tl.constexpr,
    k_stride_slot: tl.constexpr,
    v_stride_block: tl.constexpr,
    v_stride_head: tl.constexpr,
    v_stride_slot: tl.constexpr,
    out_stride_token: tl.constexpr,
    out_stride_head: tl.constexpr,
    has_lse: tl.constexpr,
    is_fp8: tl.constexpr,
    num_heads: tl.constexpr,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    v_head_dim: tl.constexpr,
    v_head_dim_padded: tl.constexpr,
    softmax_scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    input_precision: tl.constexpr,
):
    kv_head = tl.program_id(0)
    # A prompt's last query tiles have the most keys, so they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first_token = tl.load(query_start_ptr + num_decodes)
    request = _find_request_of_tile(query_start_ptr, tile, first_token, num_decodes, num_reqs, group_size, block_m)
    query_start = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - query_start
    row_start = (tile - _get_first_tile(query_start, first_token, request - num_decodes, group_size, block_m)) * block_m
    if row_start >= query_len * group_size:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    context_len = seq_len - query_len  # tokens before this step's
    row = row_start + tl.arange(0, block_m)
    token = row // group_size
    head = kv_head * group_size + row % group_size
    is_row = token < query_len
    position = context_len + token
    offs_d = tl.arange(0, head_dim_padded)
    offs_v = tl.arange(0, v_head_dim_padded)
    q_offs = (query_start + token).to(tl.int64) * q_stride_token + head * q_stride_head
    q = tl.load(
        q_ptr + q_offs[:, None] + offs_d[None, :], mask=is_row[:, None] & (offs_d < head_dim)[None, :], other=0.0
    )
    qk_scale = softmax_scale
    if is_fp8:
        q, qk_scale = prepare_fp8_queries(q, tl.load(k_scale_ptr) * softmax_scale, input_precision == "ieee")
    first_position = context_len + row_start // group_size
    kv_end = tl.minimum(context_len + (row_start + block_m - 1) // group_size + 1, seq_len)
    kv_start = 0
    unmasked_end = (first_position + 1) // block_n * block_n  # every row sees all keys of the tiles below
    if window > 0:
        kv_start = tl.maximum(first_position - window + 1, 0)
        unmasked_end = 0  # the window's edge differs from row to row: all tiles are masked
    acc = tl.zeros((block_m, v_head_dim_padded), dtype=tl.float32)
    row_max = tl.full((block_m,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((block_m,), dtype=tl.float32)
    k_ptr += kv_head * k_stride_head
    v_ptr += kv_head * v_stride_head
    block_table_ptr += request.to(tl.int64) * table_stride
    tiles_start = kv_start // block_n * block_n
    block = _load_block_ids(block_table_ptr, tiles_start, kv_end, block_size, block_n)
    for is_masked in tl.static_range(2):
        loop_start = tl.maximum(tiles_start, unmasked_end) if is_masked else tiles_start
        loop_end = kv_end if is_masked else unmasked_end
        for tile_start in range(loop_start, loop_end, block_n):
            # The next tile's block ids: loads through ids that are loaded in the same turn are pipelined half as deep.
            next_block = _load_block_ids(block_table_ptr, tile_start + block_n, kv_end, block_size, block_n)
            key = tile_start + tl.arange(0, block_n)
            k_ptrs = (
                k_ptr
                + (block.to(tl.int64) * k_stride_block + (key % block_size) * k_stride_slot)[:, None]
                + offs_d[None, :]
            )
            v_ptrs = (
                v_ptr
                + (block.to(tl.int64) * v_stride_block + (key % block_size) * v_stride_slot)[:, None]
                + offs_v[None, :]
            )
            is_key = (key >= kv_start) & (key < kv_end)
            if is_masked:
                # Slots outside the range may hold anything, NaN included, and 0 * NaN would reach the sums.
                k = tl.load(k_ptrs, mask=is_key[:, None] & (offs_d < head_dim)[None, :], other=0.0)
            elif head_dim != head_dim_padded:
                k = tl.load(k_ptrs, mask=(offs_d < head_dim)[None, :], other=0.0)
            else:
                k = tl.load(k_ptrs)
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=input_precision)
            score = scale_scores(score, qk_scale, softcap)  # (block_m, block_n)
            if is_masked:
                is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
                if window > 0:
                    is_seen = is_seen & (key[None, :] > position[:, None] - window)
                score = tl.where(is_seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            # A row that has seen nothing yet keeps -inf; subtracting zero instead gives p = 0, not NaN.
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if is_masked else new_max
            p = tl.exp2(score - safe_max[:, None])
            alpha = tl.exp2(row_max - safe_max)  # what earlier tiles' results shrink by
            row_sum = row_sum * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            if is_masked:
                v = tl.load(v_ptrs, mask=is_key[:, None] & (offs_v < v_head_dim)[None, :], other=0.0)
            elif v_head_dim != v_head_dim_padded:
                v = tl.load(v_ptrs, mask=(offs_v < v_head_dim)[None, :], other=0.0)
            else:
                v = tl.load(v_ptrs)
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=input_precision)
            row_max = new_max
            block = next_block
    result, lse = normalize_rows(acc, row_max, row_sum)
    if is_fp8:
        result *= tl.load(v_scale_ptr)
    out_offs = (query_start + token).to(tl.int64) * out_stride_token + head * out_stride_head
    out_mask = is_row[:, None] & (offs_v < v_head_dim)[None, :]
    tl.store(out_ptr + out_offs[:, None] + offs_v[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask)
    if has_lse:
        tl.store(lse_ptr + (query_start + token).to(tl.int64) * num_heads + head, lse * LN2, mask=is_row)


@triton.jit
def _get_first_tile(query_start, first_token, ordinal, group_size: tl.constexpr, block_m: tl.constexpr):
    """Index of a request's first query tile; whatever the rounding, every request before it has room for its tiles."""
    return (query_start - first_token) * group_size // block_m + ordinal


@triton.jit
def _find_request_of_tile(
    query_start_ptr, tile, first_token, num_decodes, num_reqs, group_size: tl.constexpr, block_m: tl.constexpr
):
    """The last request whose query tiles begin at or before ``tile``, by bisection."""
    left = num_decodes
    right = num_reqs
    while right - left > 1:
        middle = (left + right) // 2
        query_start = tl.load(query_start_ptr + middle)
        if _get_first_tile(query_start, first_token, middle - num_decodes, group_size, block_m) <= tile:
            left = middle
        else:
            right = middle
    return left


@triton.jit
def _load_block_ids(table_ptr, tile_start, kv_end, block_size: tl.constexpr, block_n: tl.constexpr):
    """(block_n,) int32: the block of each key; the null block from ``kv_end`` on."""
    key = tile_start + tl.arange(0, block_n)
    return tl.load(table_ptr + key // block_size, mask=key < kv_end, other=0)
