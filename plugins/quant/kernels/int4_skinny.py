"""A few tokens times int4 or int8 weights on the tensor cores: each weight is read once, whatever the tokens' number.

A program takes some tiles of 16 rows and all the tokens. Its warps share out the inputs, each with a product of its
own, and the products are added at the end: split-K without a second kernel and without atomics. ``skinny`` streams
through shared memory; ``whole`` has its weights on their way to registers before the kernel before has finished.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.ops.kernels.dependent import start_next, wait_for_previous
from quire.plugins.quant.kernels.int4_words import finish, load_groups, rows_of, scales_of, tiles_of, unpack

__all__ = ["skinny_kernel", "whole_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_kernel(
    x_ptr,  # (num_tokens, inputs)
    words_ptr,  # (tiles, blocks, 256) int32
    groups_ptr,  # (tiles, groups, 16) int32
    bias_ptr,  # (features,)
    norm_ptr,  # (inputs,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    tokens: tl.constexpr,
    tiles: tl.constexpr,
    ways: tl.constexpr,
    stages: tl.constexpr,
    depth: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    chained: tl.constexpr,
):
    """Grid: (features / 16 / tiles,). With ``s = 1 / sqrt(mean(x^2) + eps)``, ``W (g * x * s) = s * W (g * x)``: the
    squares are summed beside the products."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    program = tl.program_id(0)
    tile = tiles_of(program, features, tiles, gated)
    way = tl.arange(0, ways)
    words = words_ptr + _word_offsets(tile, blocks)
    squares = tl.zeros((ways, span) if tokens == 1 else (ways, span, tokens), dtype=tl.float32)
    acc = tl.zeros((ways, tiles * 16, 8 if tokens == 1 else tokens), dtype=tl.float32)
    wait_for_previous(chained)
    for first in tl.range(0, blocks, ways * depth, num_stages=stages):
        ps, ms, xs = (), (), ()
        for turn in tl.static_range(depth):
            block = first + turn * ways + way
            held = tl.minimum(block, blocks - 1)
            ps = ps + (tl.load(words + held[:, None, None, None] * 256, eviction_policy="evict_first"),)  # type: ignore[assignment]  # noqa: RUF005
            ms = ms + (load_groups(groups_ptr, tile, held, inputs, group, span),)  # type: ignore[assignment]  # noqa: RUF005
            g = _gains(norm_ptr, block, inputs, span, has_norm)
            x, squares = _tokens(x_ptr, g, block, squares, num_tokens, inputs, span, tokens, ways, has_norm)
            xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
        for turn in tl.static_range(depth):
            acc = _multiply(ps[turn], ms[turn], xs[turn], acc, group, bits, gated, native)
    start_next(chained)
    _finish(
        acc, squares, program, num_tokens, eps, bias_ptr, residual_ptr, out_ptr, features, inputs, tokens, tiles,
        has_bias, has_norm, gated, has_residual,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def whole_kernel(
    x_ptr,
    words_ptr,
    groups_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    tokens: tl.constexpr,
    tiles: tl.constexpr,
    ways: tl.constexpr,
    stages: tl.constexpr,
    depth: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    chained: tl.constexpr,
):
    """As ``skinny_kernel``."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    program = tl.program_id(0)
    tile = tiles_of(program, features, tiles, gated)
    way = tl.arange(0, ways)
    words = words_ptr + _word_offsets(tile, blocks)
    ps, ms, gains = (), (), ()
    for first in tl.static_range(0, blocks, ways):
        block = tl.minimum(first + way, blocks - 1)
        ps = ps + (tl.load(words + block[:, None, None, None] * 256, eviction_policy="evict_first"),)  # type: ignore[assignment]  # noqa: RUF005
        ms = ms + (load_groups(groups_ptr, tile, block, inputs, group, span),)  # type: ignore[assignment]  # noqa: RUF005
        gains = gains + (_gains(norm_ptr, first + way, inputs, span, has_norm),)  # type: ignore[assignment]  # noqa: RUF005
    start_next(chained)
    wait_for_previous(chained)
    squares = tl.zeros((ways, span) if tokens == 1 else (ways, span, tokens), dtype=tl.float32)
    xs = ()
    for turn in tl.static_range((blocks + ways - 1) // ways):
        x, squares = _tokens(
            x_ptr, gains[turn], turn * ways + way, squares, num_tokens, inputs, span, tokens, ways, has_norm
        )
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    acc = tl.zeros((ways, tiles * 16, 8 if tokens == 1 else tokens), dtype=tl.float32)
    for turn in tl.static_range((blocks + ways - 1) // ways):
        acc = _multiply(ps[turn], ms[turn], xs[turn], acc, group, bits, gated, native)
    _finish(
        acc, squares, program, num_tokens, eps, bias_ptr, residual_ptr, out_ptr, features, inputs, tokens, tiles,
        has_bias, has_norm, gated, has_residual,
    )  # fmt: skip


@triton.jit
def _word_offsets(tile, blocks: tl.constexpr):
    """(1, tiles, 2, 128) of a tile's first block."""
    half = tl.arange(0, 2)[None, None, :, None] * 128
    return tile[None, :, None, None] * (blocks * 256) + half + tl.arange(0, 128)[None, None, None, :]


@triton.jit
def _gains(norm_ptr, block, inputs: tl.constexpr, span: tl.constexpr, has_norm: tl.constexpr):
    """The norm's weights for some blocks, (ways, span), if there is a norm."""
    at = block[:, None] * span + tl.arange(0, span)[None, :]
    if has_norm:
        g = tl.load(norm_ptr + at, mask=at < inputs, other=0.0).to(tl.float32)
    else:
        g = at
    return g


@triton.jit
def _tokens(
    x_ptr, g, block, squares, num_tokens, inputs: tl.constexpr, span: tl.constexpr, tokens: tl.constexpr,
    ways: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """The tokens' inputs of some blocks, (ways, span, 8 at least), and the sum of their squares."""
    at = block[:, None] * span + tl.arange(0, span)[None, :]
    inside = at < inputs
    if tokens == 1:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
    else:
        token = tl.arange(0, tokens)[None, None, :]
        wanted = inside[:, :, None] & (token < num_tokens)
        x = tl.load(x_ptr + at[:, :, None] + token * inputs, mask=wanted, other=0.0)
    if has_norm:
        wide = x.to(tl.float32)
        squares += wide * wide
        if tokens == 1:
            x = (wide * g).to(x.dtype)
        else:
            x = (wide * g[:, :, None]).to(x.dtype)
    if tokens == 1:
        x = tl.broadcast_to(x[:, :, None], (ways, span, 8))
    return x, squares


@triton.jit
def _multiply(p, groups, x, acc, group: tl.constexpr, bits: tl.constexpr, gated: tl.constexpr, native: tl.constexpr):
    """``acc`` plus a block's product. Where a group is a block or more, its scale is applied to the product."""
    if group * bits >= 512:
        w = unpack(p, groups, bits, gated, False, native, x.dtype)
        scale = scales_of(groups[0], p.shape[1], p.shape[0], gated)
        acc += tl.dot(w, x, input_precision="ieee") * scale
    else:
        w = unpack(p, groups, bits, gated, True, native, x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def _finish(
    acc, squares, program, num_tokens, eps, bias_ptr, residual_ptr, out_ptr, features: tl.constexpr,
    inputs: tl.constexpr, tokens: tl.constexpr, tiles: tl.constexpr, has_bias: tl.constexpr, has_norm: tl.constexpr,
    gated: tl.constexpr, has_residual: tl.constexpr,
):  # fmt: skip
    """Add up the ways and finish."""
    y = tl.sum(acc, axis=0)
    if has_norm:
        if tokens == 1:
            y *= tl.rsqrt(tl.sum(squares) / inputs + eps)
        else:
            y *= tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / inputs + eps)[None, :]
    if has_bias:
        row, _ = rows_of(program, features, tiles, gated)
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    token = tl.arange(0, 8 if tokens == 1 else tokens)
    finish(y, program, token, num_tokens, residual_ptr, out_ptr, features, tiles, gated, has_residual)
