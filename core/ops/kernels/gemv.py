"""Very few tokens times a weight matrix: every program takes whole rows, so nothing is split and nothing added twice.

Weights go from memory to registers in 16-byte loads and are multiplied in float32 by the tokens, which every program
keeps in registers (``gemv_kernel``); where rows are too long for that, one token is read in blocks beside the weights
(``gemv_long_kernel``). The norm before the layer is computed by every program for itself. The order of every sum
depends on the layer's shape alone.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, operands_of, rows_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["gemv", "gemv_long"]

_VECTOR = tl.constexpr(8)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    tokens: int,
    rows: int,
    turns: int,
    num_warps: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallLinear``.

    At most ``tokens`` of them. A program takes ``rows`` rows of the weight at a time, ``turns`` times.
    """
    features, inputs = weight.shape
    operands, options = operands_of(x, weight, bias, out, norm, **tail)
    vectors = triton.next_power_of_2(triton.cdiv(inputs, 8))
    gemv_kernel[(triton.cdiv(features, rows * turns),)](
        x, weight, *operands, x.shape[0],
        vectors=vectors, tokens=tokens, rows=rows, turns=turns, num_warps=num_warps, **options,
    )  # fmt: skip


def gemv_long(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    rows: int,
    block: int,
    num_warps: int,
    **tail: Unpack[Tail],
) -> None:
    """As ``gemv``, for one token; a program takes ``rows`` rows of the weight, ``block`` inputs at a time."""
    operands, options = operands_of(x, weight, bias, out, norm, **tail)
    gemv_long_kernel[(triton.cdiv(weight.shape[0], rows),)](
        x, weight, *operands, rows=rows, block=block, num_warps=num_warps, **options
    )


@triton.jit(do_not_specialize=["num_tokens"])
def gemv_kernel(
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
    vectors: tl.constexpr,
    tokens: tl.constexpr,
    rows: tl.constexpr,
    turns: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows / turns,). The next turn's weights are on their way while one is multiplied."""
    first = tl.program_id(0) * turns
    at = tl.arange(0, vectors)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    inside = at < inputs
    weights = weight_ptr + at[None, :, :]
    row = rows_of(first, features, rows, gated).to(tl.int64)[:, None, None]
    w = tl.load(weights + row * inputs, mask=inside[None, :, :], other=0.0, eviction_policy="evict_first")
    if has_norm:
        g = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    xs = ()
    for token in tl.static_range(tokens):
        x_row = x_ptr + tl.minimum(token, num_tokens - 1) * inputs
        x = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
        if has_norm:
            scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1)) / inputs + eps)
            x = x * scale * g
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    for turn in range(turns):
        tile = first + turn
        row = rows_of(tile + 1, features, rows, gated).to(tl.int64)[:, None, None]
        wanted = inside[None, :, :] & (turn + 1 < turns)
        ahead = tl.load(weights + row * inputs, mask=wanted, other=0.0, eviction_policy="evict_first")
        wide = w.to(tl.float32)
        for token in tl.static_range(tokens):
            y = tl.sum(tl.sum(wide * xs[token][None, :, :], axis=2), axis=1)
            if has_bias:
                y += tl.load(bias_ptr + rows_of(tile, features, rows, gated)).to(tl.float32)
            finish(
                y[:, None], tile, token + tl.zeros((1,), dtype=tl.int32), num_tokens, residual_ptr, out_ptr, features,
                rows, gated, has_residual,
            )  # fmt: skip
        w = ahead


@triton.jit
def gemv_long_kernel(
    x_ptr,  # (inputs,)
    weight_ptr,  # (features, inputs)
    bias_ptr,  # (features,)
    norm_ptr,  # (inputs,)
    residual_ptr,  # (features,), half of them where gated
    out_ptr,  # as residual
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows,). With ``s = 1 / sqrt(mean(x^2) + eps)``, ``W (g * x * s) = s * W (g * x)``: the squares
    are summed beside the products."""
    row = rows_of(tl.program_id(0), features, rows, gated)
    at = tl.arange(0, block // _VECTOR)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    weights = weight_ptr + row.to(tl.int64)[:, None, None] * inputs + at[None, :, :]
    w = tl.load(weights, mask=(at < inputs)[None, :, :], other=0.0, eviction_policy="evict_first")
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    acc = tl.zeros((rows, block // _VECTOR), dtype=tl.float32)
    squares = tl.zeros((block // _VECTOR,), dtype=tl.float32)
    for first in tl.static_range(0, inputs, block):
        inside = first + at < inputs
        x = tl.load(x_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        ahead = w
        if first + block < inputs:
            wanted = (first + block + at < inputs)[None, :, :]
            ahead = tl.load(weights + (first + block), mask=wanted, other=0.0, eviction_policy="evict_first")
        if has_norm:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=2)
        w = ahead
    y = tl.sum(acc, axis=1)
    if has_norm:
        y *= tl.rsqrt(tl.sum(squares) / inputs + eps)
    if has_bias:
        y += tl.load(bias_ptr + row).to(tl.float32)
    finish(
        y[:, None], tl.program_id(0), tl.zeros((1,), dtype=tl.int32), 1, residual_ptr, out_ptr, features, rows, gated,
        has_residual,
    )  # fmt: skip
