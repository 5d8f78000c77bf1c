"""Tens of tokens times a weight matrix: tiles of many rows, on the tensor cores, the weights as the tall operand.

As ``skinny``, but all the warps of a program work on one product, over the inputs in order. Each program reads every
token once for more rows, which pays where the tokens are no longer small beside the weights.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, rows_of, tail_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["wide"]


def wide(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    tokens: int,
    rows: int,
    block: int,
    num_warps: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallLinear``.

    At most ``tokens`` (8 at least) of them. A program takes ``rows`` rows of the weight, ``block`` inputs at a time.
    There is no norm.
    """
    assert norm is None, "its launches say norm_apart"
    features, inputs = weight.shape
    bias, residual, options = tail_of(x, bias, **tail)
    wide_kernel[(triton.cdiv(features, rows),)](
        x,
        weight,
        bias,
        residual,
        out,
        x.shape[0],
        features=features,
        inputs=inputs,
        tokens=tokens,
        rows=rows,
        block=block,
        stages=num_stages,
        num_warps=num_warps,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def wide_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows,)."""
    tile = tl.program_id(0)
    row = rows_of(tile, features, rows, gated)
    token = tl.arange(0, tokens)
    at = tl.arange(0, block)
    x_row = tl.minimum(token, num_tokens - 1) * inputs
    weights = weight_ptr + row.to(tl.int64)[:, None] * inputs + at[None, :]
    pdl_wait(enable_pdl)
    acc = tl.zeros((rows, tokens), dtype=tl.float32)
    whole: tl.constexpr = inputs % block == 0
    for first in tl.range(0, inputs, block, num_stages=stages):
        if whole:
            w = tl.load(weights + first, eviction_policy="evict_first")
            x = tl.load(x_ptr + first + x_row[None, :] + at[:, None])
        else:
            inside = first + at < inputs
            w = tl.load(weights + first, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + first + x_row[None, :] + at[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)
    if has_bias:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    finish(acc, tile, token, num_tokens, residual_ptr, out_ptr, features, rows, gated, has_residual)
