"""A few tokens times int4 or int8 weights on the tensor cores: each weight is read once, whatever the tokens' number.

A program takes some tiles of 16 rows and all the tokens. Its warps share out the inputs, each with a product of its
own, and the products are added at the end: split-K without a second kernel and without atomics. So the order of every
sum depends on the layer's shape and on the padded number of tokens alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.plugins.quant.kernels.int4_words import finish, load_groups, rows_of, scales_of, tiles_of, unpack

__all__ = ["skinny_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_kernel(
    x_ptr,  # (num_tokens, inputs)
    words_ptr,  # (tiles, blocks, 256) int32
    groups_ptr,  # (tiles, groups, 16) int32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    tokens: tl.constexpr,
    tiles: tl.constexpr,
    ways: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / 16 / tiles,). A turn is ``depth`` blocks of inputs for each of ``ways`` warps."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    program = tl.program_id(0)
    tile = tiles_of(program, features, tiles, gated)
    way = tl.arange(0, ways)
    token = tl.arange(0, tokens)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    words = words_ptr + tile[None, :, None, None] * (blocks * 256) + half + tl.arange(0, 128)[None, None, None, :]
    acc = tl.zeros((ways, tiles * 16, tokens), dtype=tl.float32)
    pdl_wait(enable_pdl)
    for first in tl.range(0, blocks, ways * depth, num_stages=stages):
        ps, ms, xs = (), (), ()
        for turn in tl.static_range(depth):
            block = first + turn * ways + way
            held = tl.minimum(block, blocks - 1)
            ps = ps + (tl.load(words + held[:, None, None, None] * 256, eviction_policy="evict_first"),)  # type: ignore[assignment]  # noqa: RUF005
            ms = ms + (load_groups(groups_ptr, tile, held, inputs, group, span),)  # type: ignore[assignment]  # noqa: RUF005
            at = block[:, None] * span + tl.arange(0, span)[None, :]
            wanted = (at < inputs)[:, :, None] & (token < num_tokens)[None, None, :]
            x = tl.load(x_ptr + at[:, :, None] + token[None, None, :] * inputs, mask=wanted, other=0.0)
            xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
        for turn in tl.static_range(depth):
            acc = _multiply(ps[turn], ms[turn], xs[turn], acc, group, bits, gated, native)
    pdl_launch_dependents(enable_pdl)
    y = tl.sum(acc, axis=0)
    if has_bias:
        row, _ = rows_of(program, features, tiles, gated)
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    finish(y, program, token, num_tokens, residual_ptr, out_ptr, features, tiles, gated, has_residual)


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
