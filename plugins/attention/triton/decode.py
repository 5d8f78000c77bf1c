"""Attention of requests with one query: the keys are split over programs, then the parts are merged in order.

The query heads of a group fill the tile's rows. How a request is split depends on its own length alone, and parts are
merged from first to last, so its result does not depend on what runs beside it (Flash-Decoding: Dao et al., 2023).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch, AttentionSpec, LayerKV
from quire.plugins.attention.triton.merge import merge_kernel, parts_of
from quire.plugins.attention.triton.tile import LN2, attend_tile, finish_rows

__all__ = ["MAX_SPLITS", "SPLIT", "decode", "decode_constants", "decode_kernel", "most_splits"]

SPLIT = 256
"""Keys in a part, until a request has more than ``MAX_SPLITS`` parts; then parts grow by as much again."""
MAX_SPLITS = 32


def most_splits(spec: AttentionSpec, max_seq_len: int) -> int:
    """The most parts a request of up to ``max_seq_len`` tokens has: the third dimension of the grid."""
    length = max_seq_len if spec.window is None else min(max_seq_len, spec.window)
    return max(1, min(MAX_SPLITS, -(-length // SPLIT)))


def decode(
    spec: AttentionSpec,
    batch: AttentionBatch,
    parts: Tensor,
    part_lse: Tensor,
    q: Tensor,
    kv: LayerKV,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    """Attend for the first ``num_decodes`` requests. ``parts`` (reqs, kv_heads, splits, group, v_dim) float32 and
    ``part_lse`` (reqs, kv_heads, splits, group) are workspaces."""
    constants, options = decode_constants(spec)
    splits = most_splits(spec, batch.max_seq_len)
    common = {
        "has_lse": lse_out is not None,
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "capacity": parts.shape[2],
    }
    lse = out if lse_out is None else lse_out
    decode_kernel[(batch.num_decodes, spec.num_kv_heads, splits)](
        q,
        kv.k,
        kv.v,
        out,
        lse,
        parts,
        part_lse,
        batch.block_table,
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
        **common,
        **constants,
        **options,
    )
    if splits > 1:
        kept = {
            name: constants[name] for name in ("kv_heads", "group", "rows", "v_dim", "v_dim_pad", "window", "split")
        }
        grid = (batch.num_decodes, spec.num_kv_heads)
        merge_kernel[grid](out, lse, parts, part_lse, batch.seq_lens, **common, **kept, num_warps=4)


def decode_constants(spec: AttentionSpec) -> tuple[dict[str, Any], dict[str, int]]:
    """(compile-time constants, launch options) for ``spec``."""
    wide = spec.dtype == torch.float32
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    narrow = {64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)}
    exact = {64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 8, 1)}
    keys, warps, stages = (exact if wide else narrow)[dim]
    group = spec.num_heads // spec.num_kv_heads
    constants: dict[str, Any] = {
        "kv_heads": spec.num_kv_heads,
        "group": group,
        "page": spec.block_size,
        "dim": spec.qk_head_dim,
        "dim_pad": triton.next_power_of_2(max(spec.qk_head_dim, 16)),
        "v_dim": spec.v_head_dim,
        "v_dim_pad": triton.next_power_of_2(max(spec.v_head_dim, 16)),
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "window": spec.window or 0,
        "rows": max(16, triton.next_power_of_2(group)),
        "keys": keys,
        "split": SPLIT,
        "precision": "ieee" if wide else "tf32",
    }
    return constants, {"num_warps": warps, "num_stages": stages}


@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(
    q_ptr,  # (num_tokens, heads, dim): request i is token i
    k_ptr,  # (num_blocks, kv_heads, page, dim), any strides
    v_ptr,
    out_ptr,  # (num_tokens, heads, v_dim)
    lse_ptr,  # (num_tokens, heads) float32
    parts_ptr,  # (reqs, kv_heads, capacity, group, v_dim) float32
    part_lse_ptr,  # (reqs, kv_heads, capacity, group) float32, base two
    table_ptr,  # (num_reqs, max_blocks) int32
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
    capacity: tl.constexpr,
    kv_heads: tl.constexpr,
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
    split: tl.constexpr,
    precision: tl.constexpr,
):
    """Grid: (requests, KV heads, parts). A request of one part is finished here."""
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + request)
    begin, size, num_parts = parts_of(seq_len, capacity, window, split)
    if part >= num_parts:
        return
    low = begin + part * size
    high = tl.minimum(low + size, seq_len)
    row = tl.arange(0, rows)
    d = tl.arange(0, dim_pad)
    e = tl.arange(0, v_dim_pad)
    head = kv_head * group + row
    q_at = request * q_token + head * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=(row < group)[:, None] & (d < dim)[None, :], other=0.0)
    position = tl.full((rows,), 0, dtype=tl.int32) + (seq_len - 1)
    acc = tl.zeros((rows, v_dim_pad), dtype=tl.float32)
    peak = tl.full((rows,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((rows,), dtype=tl.float32)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    table_ptr += request * table_row
    for first_key in range(low, high, keys):
        acc, peak, mass = attend_tile(
            q, acc, peak, mass, position, k_ptr, v_ptr, table_ptr, first_key, low, high,
            k_block, k_slot, v_block, v_slot, page, dim, dim_pad, v_dim, v_dim_pad,
            scale, softcap, 0, True, keys, precision,
        )  # fmt: skip
    result, lse = finish_rows(acc, peak, mass)
    keep = (row < group)[:, None] & (e < v_dim)[None, :]
    if num_parts == 1:
        out_at = request * out_token + head * out_head
        tl.store(out_ptr + out_at[:, None] + e[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)
        if has_lse:
            tl.store(lse_ptr + request * (kv_heads * group) + head, lse * LN2, mask=row < group)
    else:
        at = ((request * kv_heads + kv_head) * capacity + part) * group + row
        tl.store(parts_ptr + at[:, None] * v_dim + e[None, :], result, mask=keep)
        tl.store(part_lse_ptr + at, lse, mask=row < group)
