"""Norm of queries and keys, rotary embedding and KV write in one kernel: a program takes a few heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.attention import LayerKV
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
) -> tuple[Tensor, Tensor]:
    """As ``quire.core.ops.rope_and_cache``, in place: ``q`` and ``k`` are overwritten and returned.

    All three may be views into one projection: each token's heads are dense, rows are strided.
    """
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, rotary_dim = k.shape[1], cos_sin.shape[1]
    cache_k, cache_v = (k, v) if kv is None else (kv.k, kv.v)
    block_size = 1 if kv is None else kv.k.shape[2]
    most = torch.finfo(cache_k.dtype).max if cache_k.dtype.itemsize == 1 else 0.0
    scales = (kv.k_scale, kv.v_scale) if kv is not None and most else (positions, positions)
    query_groups = triton.cdiv(num_heads, _HEADS)
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
        most=most,
        enable_pdl=enable_pdl,
        num_warps=4,
        launch_pdl=enable_pdl,
    )
    return q, k


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
    most: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token)
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
            most,
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
            most,
        )
        if has_cache:
            head = first + tl.arange(0, heads)[:, None]
            at = tl.arange(0, block_dim)[None, :]
            inside = (head < num_kv_heads) & (at < dim)
            v = tl.load(v_ptr + token * v_stride + head * dim + at, mask=inside, other=0.0)
            cache_v = cache_v_ptr + (slot // block_size) * cv_block + (slot % block_size) * cv_slot
            tl.store(cache_v + head * cv_head + at, _to_cache_dtype(v, v_scale_ptr, cache_v, most), mask=inside)


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
    most: tl.constexpr,
):
    """Norm and rotate ``heads`` heads of one token in place, and copy them to the cache."""
    head = first_head + tl.arange(0, heads)[:, None]
    at = tl.arange(0, block_half)[None, :]
    inside = (head < num_heads) & (at < half)
    low = tl.load(x_ptr + head * dim + at, mask=inside, other=0.0)
    high = tl.load(x_ptr + head * dim + half + at, mask=inside, other=0.0)
    rest_at = 2 * half + tl.arange(0, block_rest)[None, :]
    rest_inside = (head < num_heads) & (rest_at < dim)
    dtype = low.dtype
    if has_norm:
        a, b = low.to(tl.float32), high.to(tl.float32)
        total = tl.sum(a * a + b * b, axis=1)
        rest = tl.load(x_ptr + head * dim + rest_at, mask=rest_inside, other=0.0)
        wide = rest.to(tl.float32)
        total += tl.sum(wide * wide, axis=1)
        scale = tl.rsqrt(total / dim + eps)[:, None]
        low = tl.load(norm_ptr + at, mask=at < half, other=0.0) * (a * scale).to(dtype)
        high = tl.load(norm_ptr + half + at, mask=at < half, other=0.0) * (b * scale).to(dtype)
        rest = tl.load(norm_ptr + rest_at, mask=rest_at < dim, other=0.0) * (wide * scale).to(dtype)
        if 2 * half < dim:
            tl.store(x_ptr + head * dim + rest_at, rest, mask=rest_inside)
    cos = tl.load(cos_sin_ptr + position * 2 * half + at, mask=at < half, other=0.0)
    sin = tl.load(cos_sin_ptr + position * 2 * half + half + at, mask=at < half, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    low = (a * cos - b * sin).to(dtype)
    high = (b * cos + a * sin).to(dtype)
    tl.store(x_ptr + head * dim + at, low, mask=inside)
    tl.store(x_ptr + head * dim + half + at, high, mask=inside)
    if has_cache:
        tl.store(cache_ptr + head * cache_head + at, _to_cache_dtype(low, scale_ptr, cache_ptr, most), mask=inside)
        tl.store(
            cache_ptr + head * cache_head + half + at, _to_cache_dtype(high, scale_ptr, cache_ptr, most), mask=inside
        )
        if 2 * half < dim:
            if not has_norm:
                rest = tl.load(x_ptr + head * dim + rest_at, mask=rest_inside, other=0.0)
            tl.store(
                cache_ptr + head * cache_head + rest_at,
                _to_cache_dtype(rest, scale_ptr, cache_ptr, most),
                mask=rest_inside,
            )


@triton.jit
def _to_cache_dtype(x, scale_ptr, cache_ptr, most: tl.constexpr):
    """``x`` as the cache holds it; ``most``: the largest number of a type of one byte, else 0."""
    if most > 0:
        x = tl.minimum(tl.maximum(x.to(tl.float32) / tl.load(scale_ptr), -most), most)
    return x.to(cache_ptr.dtype.element_ty)
