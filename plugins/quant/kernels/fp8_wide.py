"""Tens of tokens times a weight of 8 bits on the tensor cores, the weights as the tall operand.

A program takes some rows of the weight and all the tokens, over its share of the inputs in order. Where there are too
few tiles of rows to fill the card, several programs share the inputs of a tile; the one that arrives last adds up what
they found, in a fixed order, so that a sum depends on the layer's shape and on the padded number of tokens alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.dependent import start_next, wait_for_previous
from quire.core.ops.kernels.linear_tail import finish, rows_of

__all__ = ["wide8"]


def wide8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    x_scale: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    partial: Tensor | None = None,
    arrived: Tensor | None = None,
    tokens: int,
    rows: int,
    block: int,
    splits: int,
    ahead: int = 0,
    num_warps: int,
    num_stages: int,
    chained: bool,
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense.

    ``scale`` (features,) float32. ``x`` is of the weight's type, with ``x_scale`` (num_tokens, 1) or (1,) float32, or
    it is not quantized: then the weights are widened to its type. ``splits`` programs share a tile's inputs, which
    they divide evenly; ``partial`` (tiles * splits * rows * tokens,) float32 and ``arrived`` (tiles,) int32, zero
    before and after, are theirs.
    """
    features, inputs = weight.shape
    assert inputs % (splits * block) == 0
    wide8_kernel[(triton.cdiv(features, rows), splits)](
        x,
        weight,
        scale,
        scale if x_scale is None else x_scale,
        x if bias is None else bias,
        x if residual is None else residual,
        scale if partial is None else partial,
        scale if arrived is None else arrived,
        out,
        x.shape[0],
        features=features,
        inputs=inputs,
        tokens=tokens,
        rows=rows,
        block=block,
        splits=splits,
        ahead=ahead if chained else 0,
        stages=num_stages,
        has_bias=bias is not None,
        gated=gated,
        has_residual=residual is not None,
        x_scales=0 if x_scale is None else (2 if x_scale.numel() > 1 else 1),
        chained=chained,
        num_warps=num_warps,
        launch_pdl=chained,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def wide8_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,)
    x_scale_ptr,  # (num_tokens,) or (1,)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    partial_ptr,  # (tiles, splits, rows, tokens)
    arrived_ptr,  # (tiles,)
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    ahead: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    x_scales: tl.constexpr,
    chained: tl.constexpr,
):
    """Grid: (features / rows, splits)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = rows_of(tile, features, rows, gated)
    token = tl.arange(0, tokens)
    share: tl.constexpr = inputs // splits
    at = split * share + tl.arange(0, block)
    x_at = x_ptr + tl.minimum(token, num_tokens - 1)[None, :] * inputs + at[:, None]
    weights = weight_ptr + row.to(tl.int64)[:, None] * inputs + at[None, :]
    whole: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    if ahead:
        tl.inline_asm_elementwise(
            f"cp.async.bulk.prefetch.L2.global [$1], {ahead}; mov.u32 $0, 0;", "=r,l",
            [weight_ptr + row.to(tl.int64) * inputs + split * share], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    wait_for_previous(chained)
    acc = tl.zeros((rows, tokens), dtype=tl.int32 if whole else tl.float32)
    for first in tl.range(0, share, block, num_stages=stages):
        w = tl.load(weights + first, eviction_policy="evict_first")
        x = tl.load(x_at + first)
        if x_scales:
            if whole:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(w, x, acc)
        else:
            acc = tl.dot(w.to(x.dtype), x, acc)
    start_next(chained)
    y = acc.to(tl.float32)
    last = True
    if splits > 1:
        mine = partial_ptr + tile * splits * rows * tokens + tl.arange(0, rows)[:, None] * tokens + token[None, :]
        tl.store(mine + split * rows * tokens, y)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(arrived_ptr + tile, 0)
            y = tl.zeros((rows, tokens), dtype=tl.float32)
            for part in tl.static_range(splits):
                y += tl.load(mine + part * rows * tokens, cache_modifier=".cg")
    if last:
        y *= tl.load(scale_ptr + row)[:, None]
        if x_scales == 2:
            y *= tl.load(x_scale_ptr + tl.minimum(token, num_tokens - 1))[None, :]
        elif x_scales == 1:
            y *= tl.load(x_scale_ptr)
        if has_bias:
            y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        finish(y, tile, token, num_tokens, residual_ptr, out_ptr, features, rows, gated, has_residual)
