"""Norm of queries and keys, rotary embedding and KV write in one kernel.

Algorithm: a program takes a few heads of one token. Each head is normed over its features where the model has weights
for that (Qwen3), and its first ``2 * half`` features are rotated in pairs (i, i + half), in float32 and rounded once;
the rest passes through. Queries and keys are written back in place; keys and values also go to the slot of their token
in the KV cache, divided by the cache's scales and saturated where it is FP8.

Shapes: ``q`` (num_tokens, num_heads, dim), ``k`` and ``v`` (num_tokens, num_kv_heads, dim), strided rows; the cache by
its strides; ``cos_sin`` (positions, 2 * half) float32.
Grid: ``(num_tokens, groups of query heads + groups of KV heads)``.
Registers: the two halves of the heads, and what is not rotated. Shared memory: the reductions alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.quant import AppendedTerm
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait, supports_pdl

__all__ = ["launch_rope_and_cache"]

_HEADS = 4


def launch_rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv: LayerKV | None,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    adapters: AppendedTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``quire.core.ops.rope_and_cache``, in place: ``q`` and ``k`` are overwritten and returned.

    All three may be views into one projection: each token's heads are dense, rows are strided.
    """
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, rotary_dim = k.shape[1], cos_sin.shape[1]
    cache_k, cache_v = (k, v) if kv is None else (kv.k, kv.v)
    block_size = 1 if kv is None else kv.k.shape[2]
    max_value = torch.finfo(cache_k.dtype).max if cache_k.dtype.itemsize == 1 else 0.0
    scales = (kv.k_scale, kv.v_scale) if kv is not None and max_value else (positions, positions)
    query_groups = triton.cdiv(num_heads, _HEADS)
    options = {} if adapters is None else _pack_adapters(adapters, num_heads * dim, num_kv_heads * dim)
    enable_pdl = supports_pdl(q.device)
    _rope_kernel[(num_tokens, query_groups + triton.cdiv(num_kv_heads, _HEADS))](
        q,
        k,
        v,
        positions,
        cos_sin,
        cache_k,
        cache_v,
        slot_mapping,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        *scales,
        eps,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        *(cache_k.stride(i) if kv is not None else 0 for i in range(3)),
        *(cache_v.stride(i) if kv is not None else 0 for i in range(3)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dim=dim,
        half=rotary_dim // 2,
        block_half=triton.next_power_of_2(rotary_dim // 2),
        block_rest=triton.next_power_of_2(max(dim - rotary_dim, 1)),
        block_dim=triton.next_power_of_2(dim),
        block_size=block_size,
        query_groups=query_groups,
        heads=_HEADS,
        has_norm=q_norm is not None,
        has_cache=kv is not None,
        max_value=max_value,
        enable_pdl=enable_pdl,
        num_warps=4,
        launch_pdl=enable_pdl,
        **options,
    )
    return q, k


def _pack_adapters(term: AppendedTerm, q_size: int, kv_size: int) -> dict[str, Any]:
    """What the kernel takes of adapters, by name."""
    return {
        "low_ptr": term.v,
        "b_ptr": term.b,
        "ranks_ptr": term.ranks,
        "token_slots_ptr": term.token_slots,
        "low_stride": term.v.stride(0),
        "low_rank": (term.b.shape[1], q_size, kv_size),
    }


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    cos_sin_ptr,
    cache_k_ptr,
    cache_v_ptr,
    slot_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    eps,
    q_stride,
    k_stride,
    v_stride,
    ck_block,
    ck_head,
    ck_slot,
    cv_block,
    cv_head,
    cv_slot,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    block_rest: tl.constexpr,
    block_dim: tl.constexpr,
    block_size: tl.constexpr,
    query_groups: tl.constexpr,
    heads: tl.constexpr,
    has_norm: tl.constexpr,
    has_cache: tl.constexpr,
    max_value: tl.constexpr,
    enable_pdl: tl.constexpr,
    low_ptr=None,  # of adapters, as in ``AppendedTerm``
    b_ptr=None,
    ranks_ptr=None,
    token_slots_ptr=None,
    low_stride=None,
    low_rank: tl.constexpr = None,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token)
    if low_rank is not None:
        low_ptr += token * low_stride
        token_slots_ptr += token
    if group < query_groups:
        _rotate_heads(
            q_ptr + token * q_stride,
            q_ptr,
            0,
            q_norm_ptr,
            cos_sin_ptr,
            position,
            group * heads,
            num_heads,
            eps,
            k_scale_ptr,
            dim,
            half,
            block_half,
            block_rest,
            heads,
            has_norm,
            False,
            max_value,
            low_ptr,
            b_ptr,
            ranks_ptr,
            token_slots_ptr,
            0,
            low_rank,
        )
    else:
        first = (group - query_groups) * heads
        cache_k = cache_k_ptr + (slot // block_size) * ck_block + (slot % block_size) * ck_slot
        _rotate_heads(
            k_ptr + token * k_stride,
            cache_k,
            ck_head,
            k_norm_ptr,
            cos_sin_ptr,
            position,
            first,
            num_kv_heads,
            eps,
            k_scale_ptr,
            dim,
            half,
            block_half,
            block_rest,
            heads,
            has_norm,
            has_cache,
            max_value,
            low_ptr,
            b_ptr,
            ranks_ptr,
            token_slots_ptr,
            1,
            low_rank,
        )
        if has_cache:
            head = first + tl.arange(0, heads)[:, None]
            offs = tl.arange(0, block_dim)[None, :]
            mask = (head < num_kv_heads) & (offs < dim)
            v = tl.load(v_ptr + token * v_stride + head * dim + offs, mask=mask, other=0.0)
            if low_rank is not None:
                v = _add_adapters(v, head * dim + offs, mask, low_ptr, b_ptr, ranks_ptr, token_slots_ptr, 2, low_rank)
            cache_v = cache_v_ptr + (slot // block_size) * cv_block + (slot % block_size) * cv_slot
            tl.store(cache_v + head * cv_head + offs, _to_cache_dtype(v, v_scale_ptr, cache_v, max_value), mask=mask)


@triton.jit
def _rotate_heads(
    x_ptr,
    cache_ptr,
    cache_head,
    norm_ptr,
    cos_sin_ptr,
    position,
    first_head,
    num_heads,
    eps,
    scale_ptr,
    dim: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    block_rest: tl.constexpr,
    heads: tl.constexpr,
    has_norm: tl.constexpr,
    has_cache: tl.constexpr,
    max_value: tl.constexpr,
    low_ptr,
    b_ptr,
    ranks_ptr,
    token_slots_ptr,
    part: tl.constexpr,
    low_rank: tl.constexpr,
):
    """Norm and rotate ``heads`` heads of one token in place, and copy them to the cache."""
    head = first_head + tl.arange(0, heads)[:, None]
    offs = tl.arange(0, block_half)[None, :]
    mask = (head < num_heads) & (offs < half)
    low = tl.load(x_ptr + head * dim + offs, mask=mask, other=0.0)
    high = tl.load(x_ptr + head * dim + half + offs, mask=mask, other=0.0)
    rest_offs = 2 * half + tl.arange(0, block_rest)[None, :]
    rest_mask = (head < num_heads) & (rest_offs < dim)
    dtype = low.dtype
    if low_rank is not None:
        at = head * dim + offs
        low = _add_adapters(low, at, mask, low_ptr, b_ptr, ranks_ptr, token_slots_ptr, part, low_rank)
        high = _add_adapters(high, at + half, mask, low_ptr, b_ptr, ranks_ptr, token_slots_ptr, part, low_rank)
        if 2 * half < dim:
            rest = tl.load(x_ptr + head * dim + rest_offs, mask=rest_mask, other=0.0)
            at_rest = head * dim + rest_offs
            rest = _add_adapters(rest, at_rest, rest_mask, low_ptr, b_ptr, ranks_ptr, token_slots_ptr, part, low_rank)
            tl.store(x_ptr + head * dim + rest_offs, rest, mask=rest_mask)  # where it is loaded from below
            tl.debug_barrier()
    if has_norm:
        a, b = low.to(tl.float32), high.to(tl.float32)
        total = tl.sum(a * a + b * b, axis=1)
        rest = tl.load(x_ptr + head * dim + rest_offs, mask=rest_mask, other=0.0)
        rest_f32 = rest.to(tl.float32)
        total += tl.sum(rest_f32 * rest_f32, axis=1)
        scale = tl.rsqrt(total / dim + eps)[:, None]
        low = tl.load(norm_ptr + offs, mask=offs < half, other=0.0) * (a * scale).to(dtype)
        high = tl.load(norm_ptr + half + offs, mask=offs < half, other=0.0) * (b * scale).to(dtype)
        rest = tl.load(norm_ptr + rest_offs, mask=rest_offs < dim, other=0.0) * (rest_f32 * scale).to(dtype)
        if 2 * half < dim:
            tl.store(x_ptr + head * dim + rest_offs, rest, mask=rest_mask)
    cos = tl.load(cos_sin_ptr + position * 2 * half + offs, mask=offs < half, other=0.0)
    sin = tl.load(cos_sin_ptr + position * 2 * half + half + offs, mask=offs < half, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    low = (a * cos - b * sin).to(dtype)
    high = (b * cos + a * sin).to(dtype)
    tl.store(x_ptr + head * dim + offs, low, mask=mask)
    tl.store(x_ptr + head * dim + half + offs, high, mask=mask)
    if has_cache:
        tl.store(cache_ptr + head * cache_head + offs, _to_cache_dtype(low, scale_ptr, cache_ptr, max_value), mask=mask)
        tl.store(
            cache_ptr + head * cache_head + half + offs,
            _to_cache_dtype(high, scale_ptr, cache_ptr, max_value),
            mask=mask,
        )
        if 2 * half < dim:
            if not has_norm:
                rest = tl.load(x_ptr + head * dim + rest_offs, mask=rest_mask, other=0.0)
            tl.store(
                cache_ptr + head * cache_head + rest_offs,
                _to_cache_dtype(rest, scale_ptr, cache_ptr, max_value),
                mask=rest_mask,
            )


@triton.jit
def _add_adapters(
    x,  # of one token
    columns,  # of each of its numbers, in the part
    mask,
    low_ptr,  # of the token: (slots, parts, max_rank)
    b_ptr,
    ranks_ptr,
    token_slots_ptr,  # of the token
    part: tl.constexpr,
    low_rank: tl.constexpr,
):
    """``x`` and the product of its adapter's v and B, rounded to its dtype."""
    max_rank: tl.constexpr = low_rank[0]
    features: tl.constexpr = low_rank[1] + 2 * low_rank[2]
    first: tl.constexpr = 0 if part == 0 else low_rank[1] + (part - 1) * low_rank[2]
    slot = tl.load(token_slots_ptr)
    held = tl.maximum(slot, 0).to(tl.int64)
    rank = tl.load(ranks_ptr + held * 3 + part, mask=slot >= 0, other=0)
    b_at = b_ptr + held * max_rank * features + first + columns
    v_at = low_ptr + (held * 3 + part) * max_rank
    y = x.to(tl.float32)
    for r in range(0, rank, 16):
        for i in tl.static_range(16):  # whose loads travel together
            b = tl.load(b_at + (r + i) * features, mask=mask & (r + i < rank), other=0.0)
            v = tl.load(v_at + r + i, mask=r + i < rank, other=0.0)
            y += v.to(tl.float32) * b.to(tl.float32)
    return y.to(x.dtype)


@triton.jit
def _to_cache_dtype(x, scale_ptr, cache_ptr, max_value: tl.constexpr):
    """``x`` as the cache holds it; ``max_value``: the largest number of a type of one byte, else 0."""
    if max_value > 0:
        x = tl.minimum(tl.maximum(x.to(tl.float32) / tl.load(scale_ptr), -max_value), max_value)
    return x.to(cache_ptr.dtype.element_ty)
