"""Rotary position embedding, fused with what stands beside it: the norm of queries and keys, and the KV write."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.quant import ActivationFormat, AppendedTerm
from quire.core.ops.norm import rms_norm_in_torch

__all__ = ["apply_rope", "rope_and_cache", "rope_and_cache_in_torch", "write_kv"]


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv: LayerKV | None,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    adapters: AppendedTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm (where weights are given) and rotate ``q`` and ``k``, then write ``k`` and ``v`` to their slots.

    ``q`` (num_tokens, num_heads, dim), ``k`` and ``v`` (num_tokens, num_kv_heads, dim); ``positions`` (num_tokens,)
    int64; ``cos_sin`` as in ``apply_rope``; ``q_norm`` and ``k_norm`` (dim,); ``slot_mapping`` (num_tokens,) int64.
    Returns the new ``q`` and ``k``, which may be the old ones overwritten. Where ``kv`` is None nothing is written:
    the backend will. ``adapters``, on a GPU: what they add to queries, keys and values, first of all.
    """
    if q.is_cuda:
        from quire.core.ops.kernels import rope_kernel as rope

        return rope.launch_rope_and_cache(q, k, v, positions, cos_sin, kv, slot_mapping, q_norm, k_norm, eps, adapters)
    assert adapters is None, "layers add them on other devices"
    return rope_and_cache_in_torch(q, k, v, positions, cos_sin, kv, slot_mapping, q_norm=q_norm, k_norm=k_norm, eps=eps)


def rope_and_cache_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv: LayerKV | None,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``rope_and_cache`` on any device; ``q`` and ``k`` stay as they are."""
    if q_norm is not None and k_norm is not None:
        q, k = (_norm_heads(x, weight, eps) for x, weight in ((q, q_norm), (k, k_norm)))
    table = cos_sin[positions]  # (num_tokens, rotary_dim) float32
    q, k = apply_rope(q, table), apply_rope(k, table)
    if kv is not None:
        write_kv(k, v, kv, slot_mapping)
    return q, k


def _norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, _ = rms_norm_in_torch(x, weight, eps, None, ActivationFormat())
    assert isinstance(y, Tensor)
    return y


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first ``rotary_dim`` features of ``x`` (num_tokens, heads, dim); the rest pass through.

    ``cos_sin`` (num_tokens, rotary_dim) float32, cosines then sines of the half-dimension angles. Pairs are
    (i, i + rotary_dim / 2), the half-split convention of Hugging Face checkpoints (Su et al., 2021, arXiv:2104.09864).
    The rotation is done in float32 and rounded once.
    """
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # (num_tokens, 1, rotary_dim / 2)
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotary_dim < x.shape[-1]:
        parts.append(x[..., rotary_dim:].float())
    return torch.cat(parts, dim=-1).to(x.dtype)


def write_kv(k: Tensor, v: Tensor, kv: LayerKV, slot_mapping: Tensor) -> None:
    """Copy ``k`` and ``v`` (num_tokens, num_kv_heads, dim) to their slots, through the cache's strides.

    A cache of one byte an element gets them divided by its scales, and the nearest it has to what it cannot hold.
    """
    block_size = kv.k.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    for x, cache, scale in ((k, kv.k, kv.k_scale), (v, kv.v, kv.v_scale)):
        if scale is not None:
            x = (x.float() / scale).clamp(torch.finfo(cache.dtype).min, torch.finfo(cache.dtype).max).to(cache.dtype)
            x, cache = x.view(torch.uint8), cache.view(torch.uint8)
        cache.transpose(1, 2)[block, offset] = x.to(cache.dtype)
