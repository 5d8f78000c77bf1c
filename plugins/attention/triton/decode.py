"""Paged split-KV decode: attention of requests with one query, or the few of a draft's verification, each.

Flash-Decoding (Dao et al., 2023) over the work list of ``decode_work_list``, as a persistent kernel:

1. A work item is one KV head of one split of a request: the queries ``q`` (query_len * group_size rows, GQA-packed:
   every query head that shares the KV head) against the split's keys. All rows share each K and V tile that is read.
2. Per tile of ``block_n`` keys: S^T = K Q^T, online softmax, O^T += V^T P^T. Keys are the rows of the tensor core's
   product and packed query rows its columns, since an MMA has 16 rows but can do with 8 columns.
3. An item that is its request's only split stores its output. Else it stores a float32 partial result and its LSE, and
   the program that finishes a request's last split merges them all, within the same launch.

Grid: (programs,), from host bounds; program i does items i, i + programs, ..., and as a rule only the first.
Memory traffic: K and V once, ``2 * kv_len * num_kv_heads * head_dim`` elements a request, which bounds the kernel;
partial results are ``query_len * num_heads * v_head_dim`` floats per split, written and read in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.attention.triton.decode_work_list import DecodeWorkList
from quire.plugins.attention.triton.fp8 import (
    has_fp8_conversion,
    load_kv_scale,
    prepare_fp8_queries,
    unpack_fp8_pairs,
)
from quire.plugins.attention.triton.online_softmax import LN2, merge_splits, normalize_rows, scale_scores
from quire.sdk import AttentionBatch, AttentionSpec, LayerKV
from quire.sdk.ops import pdl_wait, supports_pdl

__all__ = ["launch_paged_decode"]


def launch_paged_decode(
    spec: AttentionSpec,
    batch: AttentionBatch,
    work_list: DecodeWorkList,
    q: Tensor,
    kv: LayerKV,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    """Attend for the first ``num_decodes`` requests of ``batch``, for which ``work_list`` was built. Tensors as in
    ``AttentionBackend.run``."""
    is_fp8 = kv.k.dtype.itemsize == 1
    enable_pdl = supports_pdl(q.device) and not work_list.needs_even_start(batch)
    k, v = (kv.k.view(torch.int16), kv.v.view(torch.int16)) if is_fp8 else (kv.k, kv.v)
    _paged_decode_kernel[(work_list.compute_grid_size(batch),)](
        q,
        k,
        v,
        out,
        out if lse_out is None else lse_out,
        batch.seq_lens if kv.k_scale is None else kv.k_scale,
        batch.seq_lens if kv.v_scale is None else kv.v_scale,
        work_list.partial_out,
        work_list.partial_lse,
        batch.block_table,
        work_list.entries,
        work_list.num_entries,
        work_list.splits_done,
        batch.seq_lens,
        batch.block_table.stride(0),
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_block=k.stride(0),
        k_stride_head=k.stride(1),
        k_stride_slot=k.stride(2),
        v_stride_block=v.stride(0),
        v_stride_head=v.stride(1),
        v_stride_slot=v.stride(2),
        out_stride_token=out.stride(0),
        out_stride_head=out.stride(1),
        has_lse=lse_out is not None,
        native_fp8=has_fp8_conversion(q.device),
        **_build_constants(spec, work_list.tile.block_n, batch.decode_query_len),
        num_warps=work_list.tile.num_warps,
        num_stages=work_list.tile.num_stages,
        enable_pdl=enable_pdl,
        launch_pdl=enable_pdl,
    )


def _build_constants(spec: AttentionSpec, block_n: int, query_len: int) -> dict[str, Any]:
    """What the kernel is compiled for, with tiles of ``block_n`` keys and requests of ``query_len`` queries."""
    group_size = spec.num_heads // spec.num_kv_heads
    query_rows = triton.next_power_of_2(query_len * group_size)
    is_fp8 = spec.kv_dtype.itemsize == 1
    min_dim = 32 if is_fp8 else 16  # an MMA reduces over 16 elements, and FP8 comes as words of two
    return {
        "num_kv_heads": spec.num_kv_heads,
        "group_size": group_size,
        "query_len": query_len,
        "block_size": spec.block_size,
        "head_dim": spec.qk_head_dim,
        "head_dim_padded": triton.next_power_of_2(max(spec.qk_head_dim, min_dim)),
        "v_head_dim": spec.v_head_dim,
        "v_head_dim_padded": triton.next_power_of_2(max(spec.v_head_dim, min_dim)),
        "softmax_scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "is_fp8": is_fp8,
        "is_e4m3": spec.kv_dtype == torch.float8_e4m3fn,
        "block_n": block_n,
        "block_q": max(8, query_rows),
        "merge_block_q": query_rows,
        "input_precision": "ieee" if spec.dtype == torch.float32 else "tf32",
    }


@triton.jit(do_not_specialize=["table_stride"])
def _paged_decode_kernel(
    q_ptr,  # (num_tokens, num_heads, head_dim): request i begins at token i * query_len
    k_ptr,  # (num_blocks, num_kv_heads, block_size, head_dim), any strides; FP8: int16 words of two elements
    v_ptr,
    out_ptr,  # (num_tokens, num_heads, v_head_dim)
    lse_ptr,  # (num_tokens, num_heads) float32
    k_scale_ptr,  # (1,) float32, where the cache is FP8
    v_scale_ptr,
    partial_out_ptr,  # (entries, num_kv_heads, query_len * group_size, v_head_dim) float32
    partial_lse_ptr,  # (entries, num_kv_heads, query_len * group_size) float32, base two
    block_table_ptr,  # (num_reqs, max_blocks) int32
    entries_ptr,  # (entries, 4) int32, of the work list
    num_entries_ptr,  # (1,) int32
    splits_done_ptr,  # (num_reqs, num_kv_heads) int32: splits that are finished; zero before and after
    seq_lens_ptr,  # (num_reqs,) int32
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
    native_fp8: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    query_len: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    v_head_dim: tl.constexpr,
    v_head_dim_padded: tl.constexpr,
    softmax_scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    is_fp8: tl.constexpr,
    is_e4m3: tl.constexpr,
    block_n: tl.constexpr,
    block_q: tl.constexpr,
    merge_block_q: tl.constexpr,
    input_precision: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pack: tl.constexpr = 2 if is_fp8 else 1
    q_row = tl.arange(0, block_q)  # GQA-packed: query q_row // group_size, head q_row % group_size of the group
    is_row = q_row < query_len * group_size
    offs_d = tl.arange(0, head_dim_padded)
    offs_v = tl.arange(0, v_head_dim_padded)
    offs_k_word = tl.arange(0, head_dim_padded // pack)
    offs_v_word = tl.arange(0, v_head_dim_padded // pack)
    out_mask = is_row[:, None] & (offs_v < v_head_dim)[None, :]
    pdl_wait(enable_pdl)
    item = tl.program_id(0)
    # Loaded before the list's length is known, to save a round trip: the list has room for every program's first item.
    request, kv_start, kv_end, packed_split = _load_entry(entries_ptr + item // num_kv_heads * 4)
    num_items = tl.load(num_entries_ptr) * num_kv_heads
    while item < num_items:
        kv_head = item % num_kv_heads
        split = packed_split & 0xFFFF
        num_splits = packed_split >> 16
        table_ptr = block_table_ptr + request * table_stride
        block = _load_clamped_block_ids(table_ptr, kv_start, kv_end, block_size, block_n)
        q_offs = (request * query_len + q_row // group_size) * q_stride_token + (
            kv_head * group_size + q_row % group_size
        ) * q_stride_head
        q = tl.load(
            q_ptr + q_offs[:, None] + offs_d[None, :], mask=is_row[:, None] & (offs_d < head_dim)[None, :], other=0.0
        )
        qk_scale = softmax_scale
        if is_fp8:
            k_scale = load_kv_scale(k_scale_ptr, is_e4m3, native_fp8)
            q, qk_scale = prepare_fp8_queries(q, k_scale * softmax_scale, input_precision == "ieee")
            q, q_second = tl.split(tl.reshape(q, (block_q, head_dim_padded // 2, 2)))
            q_second = tl.trans(q_second)
        q = tl.trans(q)  # (head_dim_padded // pack, block_q)
        position = q_row  # of each row's query; a single query sees the whole split, and its position is not read
        if query_len > 1:
            position = tl.load(seq_lens_ptr + request) - query_len + q_row // group_size
        acc = tl.zeros((v_head_dim_padded // pack, block_q), dtype=tl.float32)
        acc_second = acc
        row_max = tl.full((block_q,), float("-inf"), dtype=tl.float32)
        # One sum per key of the tile, added up after the loop: a reduction over keys in each turn would cost shuffles.
        sums = tl.zeros((block_n, block_q), dtype=tl.float32)
        k_head_ptr = k_ptr + kv_head * k_stride_head
        v_head_ptr = v_ptr + kv_head * v_stride_head
        for tile_start in range(kv_start, kv_end, block_n):
            key = tile_start + tl.arange(0, block_n)
            # Keys beyond the end repeat the last one, so that loads need no mask; their scores are masked below.
            slot = tl.minimum(key, kv_end - 1).to(tl.uint32) % block_size
            k_ptrs = (
                k_head_ptr
                + (block.to(tl.int64) * k_stride_block + slot * k_stride_slot)[:, None]
                + offs_k_word[None, :]
            )
            v_ptrs = (
                v_head_ptr
                + (block.to(tl.int64) * v_stride_block + slot * v_stride_slot)[None, :]
                + offs_v_word[:, None]
            )
            k = tl.load(k_ptrs, mask=None if head_dim == head_dim_padded else (offs_k_word < head_dim // pack)[None, :])
            # The next tile's block ids: loads through ids that are loaded in the same turn are pipelined half as deep.
            block = _load_clamped_block_ids(table_ptr, tile_start + block_n, kv_end, block_size, block_n)
            if is_fp8:
                k, k_second = unpack_fp8_pairs(k, is_e4m3, native_fp8)
                score = tl.dot(k.to(q.dtype), q, input_precision=input_precision)
                score = tl.dot(k_second.to(q.dtype), q_second, score, input_precision=input_precision)
            else:
                score = tl.dot(k, q, input_precision=input_precision)
            score = scale_scores(score, qk_scale, softcap)  # (block_n, block_q)
            is_seen = (key < kv_end)[:, None]
            if query_len > 1:  # causal mask, and the window's edge, which differs from query to query
                is_seen = is_seen & (key[:, None] <= position[None, :])
                if window > 0:
                    is_seen = is_seen & (key[:, None] > position[None, :] - window)
            score = tl.where(is_seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 0))
            # A single query sees a tile's first key, so its maximum is finite; others may have seen no key yet, and
            # -inf - -inf would be NaN.
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if query_len > 1 else new_max
            p = tl.exp2(score - safe_max[None, :])
            alpha = tl.exp2(row_max - safe_max)  # what earlier tiles' results shrink by
            sums = sums * alpha[None, :] + p
            p = p.to(q.dtype)
            v = tl.load(
                v_ptrs, mask=None if v_head_dim == v_head_dim_padded else (offs_v_word < v_head_dim // pack)[:, None]
            )
            if is_fp8:
                v, v_second = unpack_fp8_pairs(v, is_e4m3, native_fp8)
                acc_second = tl.dot(
                    v_second.to(q.dtype), p, acc_second * alpha[None, :], input_precision=input_precision
                )
            acc = tl.dot(v.to(q.dtype), p, acc * alpha[None, :], input_precision=input_precision)
            row_max = new_max
        acc = tl.trans(acc)
        if is_fp8:
            acc = tl.reshape(tl.join(acc, tl.trans(acc_second)), (block_q, v_head_dim_padded))
        result, lse = normalize_rows(acc, row_max, tl.sum(sums, 0))
        if is_fp8:
            result *= load_kv_scale(v_scale_ptr, is_e4m3, native_fp8)
        request_out_ptr = out_ptr + request * query_len * out_stride_token + kv_head * group_size * out_stride_head
        request_lse_ptr = lse_ptr + request * query_len * (num_kv_heads * group_size) + kv_head * group_size
        if num_splits == 1:
            out_offs = q_row // group_size * out_stride_token + q_row % group_size * out_stride_head
            out_ptrs = request_out_ptr + out_offs[:, None] + offs_v[None, :]
            tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=out_mask)
            if has_lse:
                lse_ptrs = request_lse_ptr + q_row // group_size * (num_kv_heads * group_size) + q_row % group_size
                tl.store(lse_ptrs, lse * LN2, mask=is_row)
        else:
            partial_row = item * (query_len * group_size) + q_row
            tl.store(partial_out_ptr + partial_row[:, None] * v_head_dim + offs_v[None, :], result, mask=out_mask)
            tl.store(partial_lse_ptr + partial_row, lse, mask=is_row)
            tl.debug_barrier()  # every thread's stores come before the one thread's release of them
            done_ptr = splits_done_ptr + request * num_kv_heads + kv_head
            if tl.atomic_add(done_ptr, 1, sem="release") == num_splits - 1:
                tl.atomic_xchg(
                    done_ptr, 0, sem="acquire"
                )  # the other splits are visible, and the counter is clear again
                first_row = (item - split * num_kv_heads) * (query_len * group_size)
                merge_splits(
                    request_out_ptr,
                    request_lse_ptr,
                    partial_out_ptr + first_row * v_head_dim,
                    partial_lse_ptr + first_row,
                    num_splits,
                    out_stride_token,
                    out_stride_head,
                    has_lse,
                    num_kv_heads,
                    group_size,
                    query_len,
                    merge_block_q,
                    v_head_dim,
                    v_head_dim_padded,
                )
        item += tl.num_programs(0)
        request, kv_start, kv_end, packed_split = _load_entry(
            entries_ptr + tl.minimum(item, num_items - 1) // num_kv_heads * 4
        )


@triton.jit
def _load_entry(entry_ptr):
    """(request, first key, end, split | num_splits << 16) of an entry of the work list."""
    request = tl.load(entry_ptr).to(tl.int64)
    return request, tl.load(entry_ptr + 1), tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)


@triton.jit
def _load_clamped_block_ids(table_ptr, tile_start, kv_end, block_size: tl.constexpr, block_n: tl.constexpr):
    """(block_n,) int32: the block of each key; from ``kv_end`` on that of the last key."""
    key = tl.minimum(tile_start + tl.arange(0, block_n), kv_end - 1).to(tl.uint32)
    return tl.load(table_ptr + key // block_size)
