"""A few tokens times a weight of 8 bits on the tensor cores, the weights widened in registers: each is read once, and
the activations are not quantized.

A program takes some rows of the weight and all the tokens. Its warps share out the inputs, each with a product of its
own, and the products are added at the end. So the order of every sum depends on the layer's shape and on the padded
number of tokens alone.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, rows_of, tail_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["skinny8"]


def skinny8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    tokens: int,
    rows: int,
    block: int,
    ways: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense.

    ``scale`` float32, (features,) or (features / 128, inputs / 128), both rounded up; then ``block`` is 128. At most
    ``tokens`` (8 at least) of them. A program takes ``rows`` rows of the weight; it has ``ways`` warps, each with
    ``block`` inputs at a time.
    """
    features, inputs = weight.shape
    assert scale.dim() == 1 or block == 128
    bias, residual, options = tail_of(x, bias, **tail)
    skinny8_kernel[(triton.cdiv(features, rows),)](
        x,
        weight,
        scale,
        bias,
        residual,
        out,
        x.shape[0],
        features=features,
        inputs=inputs,
        tokens=tokens,
        rows=rows,
        block=block,
        ways=ways,
        stages=num_stages,
        blocks=scale.shape[1] if scale.dim() == 2 else 0,
        num_warps=ways,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def skinny8_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,), or (features / 128, blocks)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    ways: tl.constexpr,
    stages: tl.constexpr,
    blocks: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows,)."""
    tile = tl.program_id(0)
    row = rows_of(tile, features, rows, gated)
    token = tl.arange(0, tokens)
    way = tl.arange(0, ways)
    at = way[:, None] * block + tl.arange(0, block)[None, :]  # (ways, block)
    weights = weight_ptr + row.to(tl.int64)[None, :, None] * inputs + at[:, None, :]
    x_at = x_ptr + token[None, None, :] * inputs + at[:, :, None]
    there = (token < num_tokens)[None, None, :]
    pdl_wait(enable_pdl)
    acc = tl.zeros((ways, rows, tokens), dtype=tl.float32)
    whole: tl.constexpr = inputs % (ways * block) == 0
    for first in tl.range(0, inputs, ways * block, num_stages=stages):
        if whole:
            w = tl.load(weights + first, eviction_policy="evict_first")
            x = tl.load(x_at + first, mask=there & (at >= 0)[:, :, None], other=0.0)
        else:
            inside = first + at < inputs
            w = tl.load(weights + first, mask=inside[:, None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + first, mask=there & inside[:, :, None], other=0.0)
        w = w.to(tl.float32).to(x.dtype)
        if blocks:
            group = tl.minimum(first // 128 + way, blocks - 1)
            s = tl.load(scale_ptr + (row // 128 * blocks)[None, :] + group[:, None])  # (ways, rows)
            acc += tl.dot(w, x) * s[:, :, None]
        else:
            acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)
    y = tl.sum(acc, axis=0)  # (rows, tokens)
    if not blocks:
        y *= tl.load(scale_ptr + row)[:, None]
    if has_bias:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    finish(y, tile, token, num_tokens, residual_ptr, out_ptr, features, rows, gated, has_residual)
