"""Attention of requests with one query, or a few to verify: a fixed number of programs share the step's list of parts.

The queries and heads of a group fill the tile's rows. Parts of a request are merged by the program that ends last, in
order, within the same launch (Flash-Decoding: Dao et al., 2023); a request of one part is finished where it is
computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch, AttentionSpec, LayerKV
from quire.plugins.attention.triton.merge import merge_parts
from quire.plugins.attention.triton.plan import DecodePlan
from quire.plugins.attention.triton.tile import LN2, blocks_of, finish_rows, queries_for, scaled

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
    decode_kernel[(plan.grid(batch),)](
        q,
        kv.k,
        kv.v,
        out,
        out if lse_out is None else lse_out,
        batch.seq_lens if kv.k_scale is None else kv.k_scale,
        batch.seq_lens if kv.v_scale is None else kv.v_scale,
        plan.parts,
        plan.part_lse,
        batch.block_table,
        plan.items,
        plan.count,
        plan.taken,
        plan.arrived,
        batch.seq_lens,
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
        **decode_constants(spec, plan.tile.keys, batch.decode_query_len),
        num_warps=plan.tile.warps,
        num_stages=plan.tile.stages,
    )


def decode_constants(spec: AttentionSpec, keys: int, queries: int) -> dict[str, Any]:
    """What the kernel is compiled for, with tiles of ``keys`` keys and requests of so many queries."""
    group = spec.num_heads // spec.num_kv_heads
    rows, v_dim_pad = triton.next_power_of_2(queries * group), triton.next_power_of_2(max(spec.v_head_dim, 16))
    return {
        "kv_heads": spec.num_kv_heads,
        "group": group,
        "queries": queries,
        "page": spec.block_size,
        "dim": spec.qk_head_dim,
        "dim_pad": triton.next_power_of_2(max(spec.qk_head_dim, 16)),
        "v_dim": spec.v_head_dim,
        "v_dim_pad": v_dim_pad,
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "rows": max(16, rows),
        "keys": keys,
        "merge_rows": rows,
        "precision": "ieee" if spec.dtype == torch.float32 else "tf32",
    }


@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(
    q_ptr,  # (num_tokens, heads, dim): request i begins at token i * queries
    k_ptr,  # (num_blocks, kv_heads, page, dim), any strides
    v_ptr,
    out_ptr,  # (num_tokens, heads, v_dim)
    lse_ptr,  # (num_tokens, heads) float32
    k_scale_ptr,  # (1,) float32, where the cache is FP8
    v_scale_ptr,
    parts_ptr,  # (items, kv_heads, queries * group, v_dim) float32
    part_lse_ptr,  # (items, kv_heads, queries * group) float32, base two
    table_ptr,  # (num_reqs, max_blocks) int32
    items_ptr,  # (items, 4) int32, of plan_kernel
    count_ptr,  # (2,) int32, of plan_kernel
    taken_ptr,  # (1,) int32: how often an item was asked for; zero before and after
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
    fp8: tl.constexpr,
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
    rows: tl.constexpr,
    keys: tl.constexpr,
    merge_rows: tl.constexpr,
    precision: tl.constexpr,
):
    """Grid: (programs,). Program i begins with item i, then takes the next that nobody has; an item is one KV head of
    a part.

    The next item and its first blocks are read while an item is worked on, as are the next tile's blocks.
    """
    row = tl.arange(0, rows)
    real = row < queries * group
    d = tl.arange(0, dim_pad)
    e = tl.arange(0, v_dim_pad)
    keep = real[:, None] & (e < v_dim)[None, :]
    total = tl.load(count_ptr) * kv_heads
    item = tl.program_id(0)
    request, low, high, parts = _item(items_ptr, item // kv_heads, item < total)
    block = blocks_of(table_ptr + request * table_row, low, high, page, keys)
    while item < total:
        kv_head = item % kv_heads
        part = parts & 0xFFFF
        parts = parts >> 16
        q_at = (request * queries + row // group) * q_token + (kv_head * group + row % group) * q_head
        q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0)
        q = queries_for(q, k_scale_ptr, fp8, precision == "ieee")
        taken = tl.atomic_add(taken_ptr, 1, sem="relaxed")
        if taken == total - 1:  # as many are taken, or asked for in vain, as there are items: nobody will ask again
            tl.store(taken_ptr, 0)
        following = taken + tl.num_programs(0)
        next_request, next_low, next_high, next_parts = _item(items_ptr, following // kv_heads, following < total)
        position = row  # of each row's query
        if queries > 1:
            position = tl.load(seq_lens_ptr + request) - queries + row // group
        acc = tl.zeros((rows, v_dim_pad), dtype=tl.float32)
        peak = tl.full((rows,), float("-inf"), dtype=tl.float32)
        masses = tl.zeros((rows, keys), dtype=tl.float32)  # summed over keys at the end alone
        table = table_ptr + request * table_row
        k_head_ptr = k_ptr + kv_head * k_head
        v_head_ptr = v_ptr + kv_head * v_head
        for first_key in range(low, high, keys):
            key = first_key + tl.arange(0, keys)
            live = key < high
            k_at = k_head_ptr + (block.to(tl.int64) * k_block + (key % page) * k_slot)[:, None] + d[None, :]
            v_at = v_head_ptr + (block.to(tl.int64) * v_block + (key % page) * v_slot)[:, None] + e[None, :]
            k = tl.load(k_at, mask=live[:, None] & (d < dim)[None, :], other=0.0)  # (keys, dim_pad)
            block = blocks_of(table, first_key + keys, high, page, keys)
            score = scaled(
                tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=precision), scale, softcap
            )  # (rows, keys)
            seen = live[None, :]
            if queries > 1:
                seen = seen & (key[None, :] <= position[:, None])
                if window > 0:
                    seen = seen & (key[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))  # of one query never -inf: a tile's first key is live
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if queries > 1 else new_peak
            p = tl.exp2(score - base[:, None])
            shrink = tl.exp2(peak - base)
            masses = masses * shrink[:, None] + p
            v = tl.load(v_at, mask=live[:, None] & (e < v_dim)[None, :], other=0.0)  # (keys, v_dim_pad)
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=precision)
            peak = new_peak
        block = blocks_of(table_ptr + next_request * table_row, next_low, next_high, page, keys)
        mass = tl.sum(masses, 1)
        result, lse = finish_rows(acc, peak, mass)
        if fp8:
            result *= tl.load(v_scale_ptr)
        out_at = out_ptr + request * queries * out_token + kv_head * group * out_head
        lse_at = lse_ptr + request * queries * (kv_heads * group) + kv_head * group
        if parts == 1:
            row_at = row // group * out_token + row % group * out_head
            tl.store(out_at + row_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
            if has_lse:
                tl.store(lse_at + row // group * (kv_heads * group) + row % group, lse * LN2, mask=real)
        else:
            at = item * (queries * group) + row
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
        item = following
        request, low, high, parts = next_request, next_low, next_high, next_parts


@triton.jit
def _item(items_ptr, item, live):
    """(request, first key, end, part | parts << 16) of an item; nothing where there is none."""
    at = items_ptr + item * 4
    request = tl.load(at, mask=live, other=0).to(tl.int64)
    low = tl.load(at + 1, mask=live, other=0)
    return request, low, tl.load(at + 2, mask=live, other=0), tl.load(at + 3, mask=live, other=0)
