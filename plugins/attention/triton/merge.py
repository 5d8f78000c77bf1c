"""How a decoding request is cut into parts, and how the parts become one result again."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.plugins.attention.triton.tile import LN2, finish_rows

__all__ = ["merge_kernel", "parts_of"]


@triton.jit
def parts_of(seq_len, capacity: tl.constexpr, window: tl.constexpr, split: tl.constexpr):
    """(first key seen, keys in a part, number of parts) of a request."""
    begin = 0
    if window > 0:
        begin = tl.maximum(seq_len - window, 0)
    blocks = (seq_len - begin + split - 1) // split
    size = (blocks + capacity - 1) // capacity * split
    size = tl.maximum(size, split)
    return begin, size, (seq_len - begin + size - 1) // size


@triton.jit
def merge_kernel(
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    seq_lens_ptr,
    out_token: tl.constexpr,
    out_head: tl.constexpr,
    has_lse: tl.constexpr,
    capacity: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    v_dim: tl.constexpr,
    v_dim_pad: tl.constexpr,
    window: tl.constexpr,
    rows: tl.constexpr,
    split: tl.constexpr,
):
    """Grid: (requests, KV heads). Parts are weighted by their share of the softmax, from first to last."""
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    _, _, num_parts = parts_of(tl.load(seq_lens_ptr + request), capacity, window, split)
    if num_parts <= 1:
        return
    row = tl.arange(0, rows)
    e = tl.arange(0, v_dim_pad)
    real = row < group
    keep = real[:, None] & (e < v_dim)[None, :]
    acc = tl.zeros((rows, v_dim_pad), dtype=tl.float32)
    peak = tl.full((rows,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((rows,), dtype=tl.float32)
    first = (request * kv_heads + kv_head) * capacity
    for part in range(num_parts):
        at = (first + part) * group + row
        lse = tl.load(part_lse_ptr + at, mask=real, other=0.0)
        value = tl.load(parts_ptr + at[:, None] * v_dim + e[None, :], mask=keep, other=0.0)
        new_peak = tl.maximum(peak, lse)
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(lse - new_peak)
        acc = acc * shrink[:, None] + value * weight[:, None]
        mass = mass * shrink + weight
        peak = new_peak
    result, lse = finish_rows(acc, peak, mass)
    head = kv_head * group + row
    out_at = request * out_token + head * out_head
    tl.store(out_ptr + out_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
    if has_lse:
        tl.store(lse_ptr + request * (kv_heads * group) + head, lse * LN2, mask=real)
