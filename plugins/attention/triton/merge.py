"""Put the parts of a split request together, in order, so that the result does not depend on who finished first."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.plugins.attention.triton.tile import LN2, finish_rows

__all__ = ["merge_parts"]


@triton.jit
def merge_parts(
    out_ptr,  # at the request's first token and this KV head's first query head
    lse_ptr,  # likewise
    parts_ptr,  # (parts, kv_heads, queries * group, v_dim), at this KV head
    part_lse_ptr,  # (parts, kv_heads, queries * group)
    parts,
    out_token: tl.constexpr,
    out_head: tl.constexpr,
    has_lse: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    queries: tl.constexpr,
    rows: tl.constexpr,
    v_dim: tl.constexpr,
    v_dim_pad: tl.constexpr,
):
    """Weight the parts of one request and KV head by their share of the softmax, in order."""
    row = tl.arange(0, rows)
    real = row < queries * group
    e = tl.arange(0, v_dim_pad)
    keep = real[:, None] & (e < v_dim)[None, :]
    acc = tl.zeros((rows, v_dim_pad), dtype=tl.float32)
    peak = tl.full((rows,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((rows,), dtype=tl.float32)
    for part in range(parts):
        at = part * (kv_heads * queries * group) + row
        lse = tl.load(part_lse_ptr + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(parts_ptr + at[:, None] * v_dim + e[None, :], mask=keep, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(peak - base)
        acc = acc * shrink[:, None] + value * weight[:, None]
        mass = mass * shrink + weight
        peak = new_peak
    result, lse = finish_rows(acc, peak, mass)
    out_at = row // group * out_token + row % group * out_head
    tl.store(out_ptr + out_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
    if has_lse:
        tl.store(lse_ptr + row // group * (kv_heads * group) + row % group, lse * LN2, mask=real)
