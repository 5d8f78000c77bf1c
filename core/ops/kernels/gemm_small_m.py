"""A few tokens times a weight matrix on the tensor cores: each weight is read once, whatever the number of tokens.

A program takes some rows of the weight and all the tokens. Its warps share out the inputs, each with a product of its
own, and the products are added at the end: split-K without a second kernel and without atomics. So the order of every
sum depends on the layer's shape and on the padded number of tokens alone.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, operands_of, rows_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["skinny"]


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    tokens: int,
    rows: int,
    block: int,
    ways: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallLinear``.

    At most ``tokens`` (8 at least) of them. A program takes ``rows`` rows of the weight; it has ``ways`` warps, each
    with ``block`` inputs at a time.
    """
    operands, options = operands_of(x, weight, bias, out, norm, **tail)
    skinny_kernel[(triton.cdiv(weight.shape[0], rows),)](
        x, weight, *operands, x.shape[0],
        tokens=tokens, rows=rows, block=block, ways=ways, stages=num_stages, num_warps=ways, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    bias_ptr,  # (features,)
    norm_ptr,  # (inputs,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    ways: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows,). With ``s = 1 / sqrt(mean(x^2) + eps)``, ``W (g * x * s) = s * W (g * x)``: the squares
    are summed beside the products."""
    tile = tl.program_id(0)
    row = rows_of(tile, features, rows, gated)
    token = tl.arange(0, tokens)
    at = tl.arange(0, ways)[:, None] * block + tl.arange(0, block)[None, :]  # (ways, block)
    there = (token < num_tokens)[None, None, :]
    weights = weight_ptr + row.to(tl.int64)[None, :, None] * inputs + at[:, None, :]
    pdl_wait(enable_pdl)
    acc = tl.zeros((ways, rows, tokens), dtype=tl.float32)
    squares = tl.zeros((ways, block, tokens), dtype=tl.float32)
    whole: tl.constexpr = inputs % (ways * block) == 0
    for first in tl.range(0, inputs, ways * block, num_stages=stages):
        if whole:
            w = tl.load(weights + first, eviction_policy="evict_first")
            x = tl.load(x_ptr + first + token[None, None, :] * inputs + at[:, :, None], mask=there, other=0.0)
        else:
            inside = first + at < inputs
            w = tl.load(weights + first, mask=inside[:, None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(
                x_ptr + first + token[None, None, :] * inputs + at[:, :, None],
                mask=inside[:, :, None] & there,
                other=0.0,
            )
        if has_norm:
            wide = x.to(tl.float32)
            squares += wide * wide
            g = tl.load(norm_ptr + first + at, mask=first + at < inputs, other=0.0).to(tl.float32)
            x = (wide * g[:, :, None]).to(x.dtype)
        acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)
    y = tl.sum(acc, axis=0)  # (rows, tokens)
    if has_norm:
        y *= tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / inputs + eps)[None, :]
    if has_bias:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    finish(y, tile, token, num_tokens, residual_ptr, out_ptr, features, rows, gated, has_residual)
