"""A few tokens times a weight of 8 bits, widened in registers: the activations are not quantized.

Every program takes whole rows of the weight and keeps the tokens, normed if need be, in registers. Weights are loaded
16 bytes at a time and travel as 32-bit words, since bytes that are carried from one turn to the next are taken apart
and put together again. The order of every sum depends on the layer's shape alone.
"""

from __future__ import annotations

from typing import Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Tail, finish, operands_of, rows_of
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["gemv8", "gemv8_long"]


def gemv8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    norm: tuple[Tensor, float] | None = None,
    tokens: int,
    rows: int,
    turns: int,
    num_warps: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense.

    ``scale`` (features,) float32. At most ``tokens`` of them. A program takes ``rows`` rows of the weight at a time,
    ``turns`` times. ``inputs`` is a multiple of 16.
    """
    features, inputs = weight.shape
    operands, options = operands_of(x, weight, bias, out, norm, **tail)
    gemv8_kernel[(triton.cdiv(features, rows * turns),)](
        x,
        weight.view(torch.int32),
        scale,
        *operands,
        x.shape[0],
        vectors=triton.next_power_of_2(inputs // 16),
        tokens=tokens,
        rows=rows,
        turns=turns,
        whole=weight.dtype == torch.int8,
        num_warps=num_warps,
        **options,
    )


def gemv8_long(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    norm: tuple[Tensor, float] | None = None,
    rows: int,
    block: int,
    num_warps: int,
    **tail: Unpack[Tail],
) -> None:
    """As ``gemv8``, for one token; a program takes ``rows`` rows of the weight, ``block`` inputs at a time.

    ``scale`` is (features,), or (features / 128, inputs / 128), both rounded up.
    """
    operands, options = operands_of(x, weight, bias, out, norm, **tail)
    gemv8_long_kernel[(triton.cdiv(weight.shape[0], rows),)](
        x,
        weight,
        scale,
        *operands,
        rows=rows,
        block=block,
        blocks=scale.shape[1] if scale.dim() == 2 else 0,
        num_warps=num_warps,
        **options,
    )


@triton.jit
def widen(words, whole: tl.constexpr):
    """Four 8-bit numbers of each word, in order: (a, b, c) int32 -> (a, b, 4 c) float32."""
    low, high = tl.join(words, words >> 16), tl.join(words >> 8, words >> 24)
    parts = tl.join(low, high)  # (a, b, c, 2, 2)
    octets = tl.reshape(parts, (words.shape[0], words.shape[1], 4 * words.shape[2])).to(tl.int8)
    return octets.to(tl.float32) if whole else octets.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def gemv8_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs / 4) int32
    scale_ptr,  # (features,)
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
    whole: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows / turns,). The next turn's weights are on their way while one is multiplied."""
    first = tl.program_id(0) * turns
    vector = tl.arange(0, vectors)[:, None]
    word = vector * 4 + tl.arange(0, 4)[None, :]
    wanted = (word < inputs // 4)[None, :, :]
    weights = weight_ptr + word[None, :, :]
    row = rows_of(first, features, rows, gated).to(tl.int64)[:, None, None]
    w = tl.load(weights + row * (inputs // 4), mask=wanted, other=0, eviction_policy="evict_first")
    at = vector * 16 + tl.arange(0, 16)[None, :]
    inside = at < inputs
    if has_norm:
        g = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    xs = ()
    for token in tl.static_range(tokens):
        x_row = x_ptr + tl.minimum(token, num_tokens - 1) * inputs
        x = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
        if has_norm:
            x = x * tl.rsqrt(tl.sum(tl.sum(x * x, axis=1)) / inputs + eps) * g
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    for turn in range(turns):
        tile = first + turn
        next_row = rows_of(tile + 1, features, rows, gated).to(tl.int64)[:, None, None]
        ahead = tl.load(
            weights + next_row * (inputs // 4), mask=wanted & (turn + 1 < turns), other=0, eviction_policy="evict_first"
        )
        wide = widen(w, whole)
        mine = rows_of(tile, features, rows, gated)
        scale = tl.load(scale_ptr + mine)
        for token in tl.static_range(tokens):
            y = tl.sum(tl.sum(wide * xs[token][None, :, :], axis=2), axis=1) * scale
            if has_bias:
                y += tl.load(bias_ptr + mine).to(tl.float32)
            finish(
                y[:, None], tile, token + tl.zeros((1,), dtype=tl.int32), num_tokens, residual_ptr, out_ptr, features,
                rows, gated, has_residual,
            )  # fmt: skip
        w = ahead


@triton.jit
def gemv8_long_kernel(
    x_ptr,  # (inputs,)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,), or (features / 128, blocks)
    bias_ptr,  # (features,)
    norm_ptr,  # (inputs,)
    residual_ptr,  # (features,), half of them where gated
    out_ptr,  # as residual
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    blocks: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / rows,). With ``s = 1 / sqrt(mean(x^2) + eps)``, ``W (g * x * s) = s * W (g * x)``: the squares
    are summed beside the products."""
    row = rows_of(tl.program_id(0), features, rows, gated)
    at = tl.arange(0, block // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    weights = weight_ptr + row.to(tl.int64)[:, None, None] * inputs + at[None, :, :]
    w = tl.load(weights, mask=(at < inputs)[None, :, :], other=0.0, eviction_policy="evict_first")
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    acc = tl.zeros((rows, block // 16), dtype=tl.float32)
    squares = tl.zeros((block // 16,), dtype=tl.float32)
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
        part = tl.sum(w.to(tl.float32) * x[None, :, :], axis=2)
        if blocks:
            group = tl.minimum(first // 128 + tl.arange(0, block // 16) // 8, blocks - 1)
            part *= tl.load(scale_ptr + (row // 128 * blocks)[:, None] + group[None, :])
        acc += part
        w = ahead
    y = tl.sum(acc, axis=1)
    if not blocks:
        y *= tl.load(scale_ptr + row)
    if has_norm:
        y *= tl.rsqrt(tl.sum(squares) / inputs + eps)
    if has_bias:
        y += tl.load(bias_ptr + row).to(tl.float32)
    finish(
        y[:, None], tl.program_id(0), tl.zeros((1,), dtype=tl.int32), 1, residual_ptr, out_ptr, features, rows, gated,
        has_residual,
    )  # fmt: skip
