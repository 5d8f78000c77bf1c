"""The online softmax of FlashAttention in base two, and the merge of split-KV results.

A row keeps ``row_max``, the running maximum of ``score * log2(e)``, ``row_sum``, the sum of ``exp2(score - row_max)``,
and ``acc``, the weighted sum of the values (Dao, 2023, arXiv:2307.08691). exp2 is what the hardware has. Log-sum-exps
are in base two until they are stored for the caller, times ``LN2``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "merge_splits", "normalize_rows", "scale_scores"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scale_scores(qk, scale, softcap: tl.constexpr):
    """Products of queries and keys -> scores in base two, with the soft-cap ``softcap * tanh(score / softcap)``."""
    if softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); the power of two carries the 2 and the base.
        power = tl.exp2(qk * (2.0 * scale / softcap * LOG2E))
        return (softcap * LOG2E) * (1.0 - 2.0 / (power + 1.0))
    else:
        return qk * (scale * LOG2E)


@triton.jit
def normalize_rows(acc, row_max, row_sum):
    """(output, log-sum-exp in base two) of each row; a row that saw no key gives zeros and -inf."""
    has_keys = row_sum > 0
    total = tl.where(has_keys, row_sum, 1.0)
    return acc / total[:, None], tl.where(has_keys, row_max + tl.log2(total), float("-inf"))


@triton.jit
def merge_splits(
    out_ptr,  # at the request's first token and this KV head's first query head
    lse_ptr,  # likewise
    partial_out_ptr,  # (num_splits, num_kv_heads, query_len * group_size, v_head_dim) float32, at this KV head
    partial_lse_ptr,  # (num_splits, num_kv_heads, query_len * group_size) float32
    num_splits,
    out_stride_token: tl.constexpr,
    out_stride_head: tl.constexpr,
    has_lse: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    query_len: tl.constexpr,
    block_q: tl.constexpr,
    v_head_dim: tl.constexpr,
    v_head_dim_padded: tl.constexpr,
):
    """LSE merge of one request's splits for one KV head: each split weighs ``exp2(its LSE - total LSE)``.

    Splits are added in order, so that the result does not depend on which program finished first.
    """
    q_row = tl.arange(0, block_q)
    is_row = q_row < query_len * group_size
    offs_v = tl.arange(0, v_head_dim_padded)
    out_mask = is_row[:, None] & (offs_v < v_head_dim)[None, :]
    acc = tl.zeros((block_q, v_head_dim_padded), dtype=tl.float32)
    row_max = tl.full((block_q,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((block_q,), dtype=tl.float32)
    for split in range(num_splits):
        row = split * (num_kv_heads * query_len * group_size) + q_row
        # .cg: other SMs have just written these, and only the L2 cache is coherent between SMs.
        lse = tl.load(partial_lse_ptr + row, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partial_out_ptr + row[:, None] * v_head_dim + offs_v[None, :]
        partial = tl.load(partial_ptrs, mask=out_mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(lse - safe_max)
        alpha = tl.exp2(row_max - safe_max)
        acc = acc * alpha[:, None] + partial * weight[:, None]
        row_sum = row_sum * alpha + weight
        row_max = new_max
    result, lse = normalize_rows(acc, row_max, row_sum)
    out_offs = q_row // group_size * out_stride_token + q_row % group_size * out_stride_head
    tl.store(out_ptr + out_offs[:, None] + offs_v[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask)
    if has_lse:
        tl.store(
            lse_ptr + q_row // group_size * (num_kv_heads * group_size) + q_row % group_size, lse * LN2, mask=is_row
        )
