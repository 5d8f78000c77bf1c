"""Attention of requests with one query, or a few to verify, over the step's list of parts.

Keys fill the rows of a tensor core's product and the queries of a group its columns, of which 8 are the fewest. Parts
of a request are merged by the program that ends last, in order, within the same launch (Flash-Decoding: Dao et al.,
2023); a request of one part is finished where it is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.pdl import pdl_wait, supports_pdl
from quire.plugins.attention.triton.decode_work_list import DecodePlan
from quire.plugins.attention.triton.fp8 import converts, features_of, queries_for, scale_of
from quire.plugins.attention.triton.merge import merge_parts
from quire.plugins.attention.triton.tile import LN2, finish_rows, scaled
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV

__all__ = ["decode", "decode_constants", "decode_kernel"]


def decode(
    spec: AttentionSpec,
    batch: AttentionBatch,
    plan: DecodePlan,
    q: Tensor,
    kv: LayerKV,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    """Attend for the first ``num_decodes`` requests, whose parts are listed in ``plan``."""
    fp8, enable_pdl = kv.k.dtype.itemsize == 1, supports_pdl(q.device)
    k, v = (kv.k.view(torch.int16), kv.v.view(torch.int16)) if fp8 else (kv.k, kv.v)
    decode_kernel[(plan.grid(batch),)](
        q,
        k,
        v,
        out,
        out if lse_out is None else lse_out,
        batch.seq_lens if kv.k_scale is None else kv.k_scale,
        batch.seq_lens if kv.v_scale is None else kv.v_scale,
        plan.parts,
        plan.part_lse,
        batch.block_table,
        plan.items,
        plan.count,
        plan.arrived,
        batch.seq_lens,
        batch.block_table.stride(0),
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_block=k.stride(0),
        k_head=k.stride(1),
        k_slot=k.stride(2),
        v_block=v.stride(0),
        v_head=v.stride(1),
        v_slot=v.stride(2),
        out_token=out.stride(0),
        out_head=out.stride(1),
        has_lse=lse_out is not None,
        fast=converts(q.device),
        **decode_constants(spec, plan.tile.keys, batch.decode_query_len),
        num_warps=plan.tile.warps,
        num_stages=plan.tile.stages,
        enable_pdl=enable_pdl,
        launch_pdl=enable_pdl,
    )


def decode_constants(spec: AttentionSpec, keys: int, queries: int) -> dict[str, Any]:
    """What the kernel is compiled for, with tiles of ``keys`` keys and requests of so many queries."""
    group = spec.num_heads // spec.num_kv_heads
    columns = triton.next_power_of_2(queries * group)
    fp8 = spec.kv_dtype.itemsize == 1
    least = 32 if fp8 else 16  # features of a tile
    return {
        "kv_heads": spec.num_kv_heads,
        "group": group,
        "queries": queries,
        "page": spec.block_size,
        "dim": spec.qk_head_dim,
        "dim_pad": triton.next_power_of_2(max(spec.qk_head_dim, least)),
        "v_dim": spec.v_head_dim,
        "v_dim_pad": triton.next_power_of_2(max(spec.v_head_dim, least)),
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "fp8": fp8,
        "e4m3": spec.kv_dtype == torch.float8_e4m3fn,
        "keys": keys,
        "columns": max(8, columns),
        "merge_rows": columns,
        "precision": "ieee" if spec.dtype == torch.float32 else "tf32",
    }


@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(
    q_ptr,  # (num_tokens, heads, dim): request i begins at token i * queries
    k_ptr,  # (num_blocks, kv_heads, page, dim), any strides; FP8: int16 words of two features
    v_ptr,
    out_ptr,  # (num_tokens, heads, v_dim)
    lse_ptr,  # (num_tokens, heads) float32
    k_scale_ptr,  # (1,) float32, where the cache is FP8
    v_scale_ptr,
    parts_ptr,  # (items, kv_heads, queries * group, v_dim) float32
    part_lse_ptr,  # (items, kv_heads, queries * group) float32, base two
    table_ptr,  # (num_reqs, max_blocks) int32
    items_ptr,  # (items, 4) int32, of plan_kernel
    count_ptr,  # (1,) int32, of plan_kernel
    arrived_ptr,  # (num_reqs, kv_heads) int32: parts that are done; zero before and after
    seq_lens_ptr,  # (num_reqs,) int32
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
    fast: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    queries: tl.constexpr,
    page: tl.constexpr,
    dim: tl.constexpr,
    dim_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_dim_pad: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    fp8: tl.constexpr,
    e4m3: tl.constexpr,
    keys: tl.constexpr,
    columns: tl.constexpr,
    merge_rows: tl.constexpr,
    precision: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (programs,). An item is one KV head of a part. Program i does item i, and as a rule no other: the GPU
    starts programs in order as others end, so that long requests come first. The next tile's blocks are read while
    a tile is worked on."""
    pair: tl.constexpr = 2 if fp8 else 1
    column = tl.arange(0, columns)
    real = column < queries * group
    d = tl.arange(0, dim_pad)
    e = tl.arange(0, v_dim_pad)
    word = tl.arange(0, dim_pad // pair)
    v_word = tl.arange(0, v_dim_pad // pair)
    keep = real[:, None] & (e < v_dim)[None, :]
    pdl_wait(enable_pdl)
    item = tl.program_id(0)
    request, low, high, packed = _item(items_ptr + item // kv_heads * 4)  # the list has room for every program
    total = tl.load(count_ptr) * kv_heads
    while item < total:
        kv_head = item % kv_heads
        part = packed & 0xFFFF
        parts = packed >> 16
        table = table_ptr + request * table_row
        block = _blocks(table, low, high, page, keys)
        q_at = (request * queries + column // group) * q_token + (kv_head * group + column % group) * q_head
        q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0)
        unit = scale  # of products of queries and keys
        if fp8:
            q, unit = queries_for(q, scale_of(k_scale_ptr, e4m3, fast) * scale, precision == "ieee")
            q, q_second = tl.split(tl.reshape(q, (columns, dim_pad // 2, 2)))
            q_second = tl.trans(q_second)
        q = tl.trans(q)  # (dim_pad // pair, columns)
        position = column  # of each column's query
        if queries > 1:
            position = tl.load(seq_lens_ptr + request) - queries + column // group
        acc = tl.zeros((v_dim_pad // pair, columns), dtype=tl.float32)
        acc_second = acc
        peak = tl.full((columns,), float("-inf"), dtype=tl.float32)
        masses = tl.zeros((keys, columns), dtype=tl.float32)  # summed over keys at the end alone
        k_head_ptr = k_ptr + kv_head * k_head
        v_head_ptr = v_ptr + kv_head * v_head
        for first_key in range(low, high, keys):
            key = first_key + tl.arange(0, keys)
            slot = tl.minimum(key, high - 1).to(tl.uint32) % page
            k_at = k_head_ptr + (block.to(tl.int64) * k_block + slot * k_slot)[:, None] + word[None, :]
            v_at = v_head_ptr + (block.to(tl.int64) * v_block + slot * v_slot)[None, :] + v_word[:, None]
            k = tl.load(k_at, mask=None if dim == dim_pad else (word < dim // pair)[None, :])
            block = _blocks(table, first_key + keys, high, page, keys)
            if fp8:
                k, k_second = features_of(k, e4m3, fast)
                score = tl.dot(k.to(q.dtype), q, input_precision=precision)
                score = tl.dot(k_second.to(q.dtype), q_second, score, input_precision=precision)
            else:
                score = tl.dot(k, q, input_precision=precision)
            score = scaled(score, unit, softcap)  # (keys, columns)
            seen = (key < high)[:, None]
            if queries > 1:
                seen = seen & (key[:, None] <= position[None, :])
                if window > 0:
                    seen = seen & (key[:, None] > position[None, :] - window)
            score = tl.where(seen, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 0))  # of one query never -inf: a tile's first key is live
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if queries > 1 else new_peak
            p = tl.exp2(score - base[None, :])
            shrink = tl.exp2(peak - base)
            masses = masses * shrink[None, :] + p
            p = p.to(q.dtype)
            v = tl.load(v_at, mask=None if v_dim == v_dim_pad else (v_word < v_dim // pair)[:, None])
            if fp8:
                v, v_second = features_of(v, e4m3, fast)
                acc_second = tl.dot(v_second.to(q.dtype), p, acc_second * shrink[None, :], input_precision=precision)
            acc = tl.dot(v.to(q.dtype), p, acc * shrink[None, :], input_precision=precision)
            peak = new_peak
        acc = tl.trans(acc)
        if fp8:
            acc = tl.reshape(tl.join(acc, tl.trans(acc_second)), (columns, v_dim_pad))
        result, lse = finish_rows(acc, peak, tl.sum(masses, 0))
        if fp8:
            result *= scale_of(v_scale_ptr, e4m3, fast)
        out_at = out_ptr + request * queries * out_token + kv_head * group * out_head
        lse_at = lse_ptr + request * queries * (kv_heads * group) + kv_head * group
        if parts == 1:
            row_at = column // group * out_token + column % group * out_head
            tl.store(out_at + row_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
            if has_lse:
                tl.store(lse_at + column // group * (kv_heads * group) + column % group, lse * LN2, mask=real)
        else:
            at = item * (queries * group) + column
            tl.store(parts_ptr + at[:, None] * v_dim + e[None, :], result, mask=keep)
            tl.store(part_lse_ptr + at, lse, mask=real)
            tl.debug_barrier()  # every thread's stores come before the one thread's count
            arrived = arrived_ptr + request * kv_heads + kv_head
            if tl.atomic_add(arrived, 1, sem="release") == parts - 1:
                tl.atomic_xchg(arrived, 0, sem="acquire")
                first = (item - part * kv_heads) * (queries * group)
                merge_parts(
                    out_at, lse_at, parts_ptr + first * v_dim, part_lse_ptr + first, parts,
                    out_token, out_head, has_lse, kv_heads, group, queries, merge_rows, v_dim, v_dim_pad,
                )  # fmt: skip
        item += tl.num_programs(0)
        request, low, high, packed = _item(items_ptr + tl.minimum(item, total - 1) // kv_heads * 4)


@triton.jit
def _item(entry_ptr):
    """(request, first key, end, part | parts << 16) of an item."""
    request = tl.load(entry_ptr).to(tl.int64)
    return request, tl.load(entry_ptr + 1), tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)


@triton.jit
def _blocks(table_ptr, first_key, high, page: tl.constexpr, keys: tl.constexpr):
    """(keys,) int32: the blocks of so many keys; from ``high`` on, that of the last key, whose scores are masked."""
    key = tl.minimum(first_key + tl.arange(0, keys), high - 1).to(tl.uint32)
    return tl.load(table_ptr + key // page)
