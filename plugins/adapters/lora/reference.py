"""LoRA in torch: what the kernels compute, and what runs on the CPU."""

from __future__ import annotations

from torch import Tensor

from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.sdk.ops import rms_norm

__all__ = ["apply_lora", "apply_one_adapter"]


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
