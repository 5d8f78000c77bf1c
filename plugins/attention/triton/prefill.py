"""Attention of chunks of a prompt: tiles of query rows against all the keys before them.

A tile is ``rows`` consecutive (token, head of the group) pairs of one request and one KV head, so that each page of
keys is read once for the whole group. The grid is an upper bound known on the host; lengths are read on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.attention.triton.fp8 import queries_for
from quire.plugins.attention.triton.tile import LN2, attend_tile, blocks_of, finish_rows
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV

__all__ = ["prefill", "prefill_constants", "prefill_kernel"]


def prefill(
    spec: AttentionSpec, batch: AttentionBatch, q: Tensor, kv: LayerKV, out: Tensor, lse_out: Tensor | None
) -> None:
    """Attend for the requests after the decodes. Tensors as in ``AttentionBackend.run``."""
    constants, options = prefill_constants(spec)
    requests = batch.num_reqs - batch.num_decodes
    tokens = batch.num_tokens - batch.num_decodes * batch.decode_query_len
    group = spec.num_heads // spec.num_kv_heads
    grid = (spec.num_kv_heads, tokens * group // constants["rows"] + requests)
    prefill_kernel[grid](
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
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_block=kv.k.stride(0),
        k_head=kv.k.stride(1),
        k_slot=kv.k.stride(2),
        v_block=kv.v.stride(0),
        v_head=kv.v.stride(1),
        v_slot=kv.v.stride(2),
        out_token=out.stride(0),
        out_head=out.stride(1),
        has_lse=lse_out is not None,
        fp8=kv.k.dtype.itemsize == 1,
        **constants,
        **options,
    )


def prefill_constants(spec: AttentionSpec) -> tuple[dict[str, Any], dict[str, int]]:
    """(compile-time constants, launch options) for ``spec``: query tiles of 128 rows in 16-bit types."""
    wide = spec.dtype == torch.float32
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    # (rows, keys, warps, stages): what compiles without spilling registers (tests/aot). float32 has no tensor cores.
    narrow = {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)}
    exact = {64: (32, 32, 4, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)}
    rows, keys, warps, stages = (exact if wide else narrow)[dim]
    constants: dict[str, Any] = {
        "heads": spec.num_heads,
        "group": spec.num_heads // spec.num_kv_heads,
        "page": spec.block_size,
        "dim": spec.qk_head_dim,
        "dim_pad": triton.next_power_of_2(max(spec.qk_head_dim, 16)),
        "v_dim": spec.v_head_dim,
        "v_dim_pad": triton.next_power_of_2(max(spec.v_head_dim, 16)),
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "rows": rows,
        "keys": keys,
        "precision": "ieee" if wide else "tf32",
    }
    return constants, {"num_warps": warps, "num_stages": stages}


@triton.jit(do_not_specialize=["num_decodes", "num_reqs", "table_row"])
def prefill_kernel(
    q_ptr,  # (num_tokens, heads, dim)
    k_ptr,  # (num_blocks, kv_heads, page, dim), any strides
    v_ptr,
    out_ptr,  # (num_tokens, heads, v_dim)
    lse_ptr,  # (num_tokens, heads) float32
    k_scale_ptr,  # (1,) float32, where the cache is FP8
    v_scale_ptr,
    table_ptr,  # (num_reqs, max_blocks) int32
    seq_lens_ptr,  # (num_reqs,) int32
    start_ptr,  # (num_reqs + 1,) int32
    num_decodes,
    num_reqs,
    table_row,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_block: tl.constexpr,
    k_head: tl.constexpr,
    k_slot: tl.constexpr,
    v_block: tl.constexpr,
    v_head: tl.constexpr,
    v_slot: tl.constexpr,
    out_token: tl.constexpr,
    out_head: tl.constexpr,
    has_lse: tl.constexpr,
    fp8: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    page: tl.constexpr,
    dim: tl.constexpr,
    dim_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_dim_pad: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    precision: tl.constexpr,
):
    """Grid: (KV heads, tiles of all the prompts). A prompt's last tiles have the most keys, so they go first."""
    kv_head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    base = tl.load(start_ptr + num_decodes)
    request = _owner(start_ptr, index, base, num_decodes, num_reqs, group, rows)
    start = tl.load(start_ptr + request)
    num_queries = tl.load(start_ptr + request + 1) - start
    row0 = (index - _first_tile(start, base, request - num_decodes, group, rows)) * rows
    if row0 >= num_queries * group:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - num_queries
    row = row0 + tl.arange(0, rows)
    token = row // group
    head = kv_head * group + row % group
    real = token < num_queries
    position = context + token
    d = tl.arange(0, dim_pad)
    q_at = (start + token).to(tl.int64) * q_token + head * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0)
    unit = scale  # of products of queries and keys
    if fp8:
        q, unit = queries_for(q, tl.load(k_scale_ptr) * scale, precision == "ieee")
    first_position = context + row0 // group
    high = tl.minimum(context + (row0 + rows - 1) // group + 1, seq_len)
    low = 0
    shared = (first_position + 1) // keys * keys  # keys below are seen by every row
    if window > 0:
        low = tl.maximum(first_position - window + 1, 0)
        shared = 0  # the window's edge differs from row to row: mask throughout
    acc = tl.zeros((rows, v_dim_pad), dtype=tl.float32)
    peak = tl.full((rows,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((rows,), dtype=tl.float32)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    table_ptr += request.to(tl.int64) * table_row
    begin = low // keys * keys
    block = blocks_of(table_ptr, begin, high, page, keys)
    for first_key in range(begin, shared, keys):
        following = blocks_of(table_ptr, first_key + keys, high, page, keys)
        acc, peak, mass = attend_tile(
            q, acc, peak, mass, position, k_ptr, v_ptr, block, first_key, low, high,
            k_block, k_slot, v_block, v_slot, page, dim, dim_pad, v_dim, v_dim_pad,
            unit, softcap, window, False, keys, precision,
        )  # fmt: skip
        block = following
    for first_key in range(tl.maximum(begin, shared), high, keys):
        following = blocks_of(table_ptr, first_key + keys, high, page, keys)
        acc, peak, mass = attend_tile(
            q, acc, peak, mass, position, k_ptr, v_ptr, block, first_key, low, high,
            k_block, k_slot, v_block, v_slot, page, dim, dim_pad, v_dim, v_dim_pad,
            unit, softcap, window, True, keys, precision,
        )  # fmt: skip
        block = following
    result, lse = finish_rows(acc, peak, mass)
    if fp8:
        result *= tl.load(v_scale_ptr)
    e = tl.arange(0, v_dim_pad)
    out_at = (start + token).to(tl.int64) * out_token + head * out_head
    keep = real[:, None] & (e < v_dim)[None, :]
    tl.store(out_ptr + out_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
    if has_lse:
        tl.store(lse_ptr + (start + token).to(tl.int64) * heads + head, lse * LN2, mask=real)


@triton.jit
def _first_tile(start, base, ordinal, group: tl.constexpr, rows: tl.constexpr):
    """Where a request's tiles begin: room for every tile before it, whatever the rounding."""
    return (start - base) * group // rows + ordinal


@triton.jit
def _owner(start_ptr, index, base, num_decodes, num_reqs, group: tl.constexpr, rows: tl.constexpr):
    """The last request whose tiles begin at or before ``index``, by bisection."""
    left = num_decodes
    right = num_reqs
    while right - left > 1:
        middle = (left + right) // 2
        if _first_tile(tl.load(start_ptr + middle), base, middle - num_decodes, group, rows) <= index:
            left = middle
        else:
            right = middle
    return left
