"""LoRA in torch: what the kernels compute, and what runs on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.sdk.ops import rms_norm

__all__ = ["add_appended", "apply_lora", "apply_one_adapter"]


def apply_lora(
    x: Tensor,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    part_sizes: tuple[int, ...],
    batch: AdapterBatch,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """As ``kernels.launch_lora``, an adapter at a time."""
    if norm is not None:
        x = rms_norm(x, *norm)[0]
    for slot, tokens in batch.iter_slots():
        if int(ranks[slot].max()):
            rows = out[tokens]
            apply_one_adapter(x[tokens], rows, a[slot], b[slot], part_sizes)
            out[tokens] = rows


def apply_one_adapter(x: Tensor, out: Tensor, a: Tensor, b: Tensor, part_sizes: tuple[int, ...]) -> None:
    """Add to ``out`` (num_tokens, features) one adapter's part: ``a`` (parts, max_rank, inputs), ``b`` (max_rank,
    features), both zero beyond its rank."""
    v = x.to(a.dtype) @ a.flatten(0, 1).T  # (num_tokens, parts * max_rank): all parts share one product
    offset = 0
    for v_of_part, size in zip(v.chunk(len(part_sizes), 1), part_sizes, strict=True):
        columns, b_of_part = out[:, offset : offset + size], b[:, offset : offset + size]
        if b.dtype == out.dtype:
            columns.addmm_(v_of_part, b_of_part)
        else:
            columns += (v_of_part @ b_of_part).to(out.dtype)
        offset += size


def add_appended(
    wide: Tensor,
    b: Tensor,
    part_sizes: tuple[int, ...],
    batch: AdapterBatch,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As ``appended_kernels.launch_add_appended``, a token at a time."""
    _, max_rank, features = b.shape
    out = wide[:, :features].to(torch.float32, copy=True)
    v = wide[:, features : features + batch.tiles.num_slots * len(part_sizes) * max_rank]
    v = v.unflatten(1, (-1, len(part_sizes), max_rank)).float()  # (num_tokens, slots, parts, max_rank)
    for token, slot in enumerate(batch.tiles.token_slots[: len(wide)].tolist()):
        if slot >= 0:
            parts = b[slot].float().split(part_sizes, 1)
            out[token] += torch.cat([v[token, slot, part] @ each for part, each in enumerate(parts)])
    if gated:
        gate, up = out.chunk(2, 1)
        out = F.silu(gate) * up
    return (out if residual is None else out + residual).to(wide.dtype)
