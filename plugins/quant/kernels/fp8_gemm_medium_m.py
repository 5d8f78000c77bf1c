"""Tens to hundreds of tokens times a weight of 8 bits on the tensor cores: a program takes some rows of the weight and
a tile of the tokens, over all the inputs in order.

The matrix instruction wants 64 rows or more of its first operand: the weight's, or the tokens', so that a tile may have
as few as 16 rows of the weight and the card is filled without sharing out the inputs.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, rows_of, tail_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["wide8"]


def wide8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    x_scale: Tensor,
    tokens: int,
    rows: int,
    block: int,
    tokens_first: bool = False,
    num_warps: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense, of one
    type; ``block`` divides ``inputs``.

    ``scale`` float32, (features,) or (features / 128, inputs / 128), both rounded up; then ``block`` is 128.
    ``x_scale`` float32, (num_tokens, 1) or (1,), or (num_tokens, inputs / 128) of any second stride where scales are by
    block. A program takes ``rows`` rows of the weight and ``tokens`` (8 at least;
    64 where ``tokens_first``, as the first operand) tokens.
    """
    features, inputs = weight.shape
    assert inputs % block == 0 and (scale.dim() == 1 or block == 128) and x.dtype == weight.dtype
    bias, residual, options = tail_of(scale, bias, **tail)
    wide8_kernel[(triton.cdiv(x.shape[0], tokens), triton.cdiv(features, rows))](
        x,
        weight,
        scale,
        x_scale,
        bias,
        residual,
        out,
        x.shape[0],
        x_scale.stride(-1),
        features=features,
        inputs=inputs,
        tokens=tokens,
        rows=rows,
        block=block,
        tokens_first=tokens_first,
        stages=num_stages,
        blocks=scale.shape[1] if scale.dim() == 2 else 0,
        one_x_scale=x_scale.numel() == 1,
        groups=x_scale.dim() == 2 and x_scale.shape[1] > 1,
        num_warps=num_warps,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens", "x_scale_group"])
def wide8_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,), or (features / 128, blocks)
    x_scale_ptr,  # (num_tokens,) or (1,), or (blocks, x_scale_group), a group's tokens side by side
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    x_scale_group,
    features: tl.constexpr,
    inputs: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    tokens_first: tl.constexpr,
    stages: tl.constexpr,
    blocks: tl.constexpr,
    one_x_scale: tl.constexpr,
    groups: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (num_tokens / tokens, features / rows): programs that share weights run at the same time."""
    tile = tl.program_id(1)
    row = rows_of(tile, features, rows, gated)
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    at = tl.arange(0, block)
    x_row, w_row = token.to(tl.int64) * inputs, row.to(tl.int64) * inputs
    if tokens_first:
        x_at, w_at = x_ptr + x_row[:, None] + at[None, :], weight_ptr + w_row[None, :] + at[:, None]
        there = (token < num_tokens)[:, None] & (at >= 0)[None, :]
    else:
        x_at, w_at = x_ptr + x_row[None, :] + at[:, None], weight_ptr + w_row[:, None] + at[None, :]
        there = (token < num_tokens)[None, :] & (at >= 0)[:, None]
    pdl_wait(enable_pdl)
    sums: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 and not blocks else tl.float32
    acc = tl.zeros((tokens, rows) if tokens_first else (rows, tokens), dtype=sums)
    for first in tl.range(0, inputs, block, num_stages=stages):
        w = tl.load(w_at + first, eviction_policy="evict_first")
        x = tl.load(x_at + first, mask=there, other=0.0)
        if blocks:
            s = tl.load(scale_ptr + row // 128 * blocks + first // 128)
            part = (tl.dot(x, w) * s[None, :]) if tokens_first else (tl.dot(w, x) * s[:, None])
            if groups:
                x_s = tl.load(x_scale_ptr + first // 128 * x_scale_group + token, mask=token < num_tokens, other=0.0)
                part *= x_s[:, None] if tokens_first else x_s[None, :]
            acc += part
        elif tokens_first:
            acc = tl.dot(x, w, acc, out_dtype=sums)
        else:
            acc = tl.dot(w, x, acc, out_dtype=sums)
    pdl_launch_dependents(enable_pdl)
    y = (tl.trans(acc) if tokens_first else acc).to(tl.float32)
    if not blocks:
        y *= tl.load(scale_ptr + row)[:, None]
    if one_x_scale:
        y *= tl.load(x_scale_ptr)
    elif not groups:
        y *= tl.load(x_scale_ptr + token, mask=token < num_tokens, other=0.0)[None, :]
    if has_bias:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    finish(y, tile, token, num_tokens, residual_ptr, out_ptr, features, rows, gated, has_residual)
