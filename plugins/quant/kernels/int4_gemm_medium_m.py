"""Tens of tokens and more times int4 or int8 weights, on the tensor cores.

All the warps of a program work on one product, over the inputs in order. On Hopper that is ``wgmma`` with the weights
as the operand in registers and the tokens in shared memory. Where the programs are too few to fill the card, each takes
a share of the inputs, and ``combine`` adds up. ``dequantize`` writes the weights out, for the library's GEMM.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.plugins.quant.kernels.int4_words import finish, load_groups, rows_of, scales_of, tiles_of, unpack

__all__ = ["combine_kernel", "dequantize_kernel", "wide_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def wide_kernel(
    x_ptr,  # (num_tokens, inputs)
    words_ptr,  # (tiles, blocks, 256) int32
    groups_ptr,  # (tiles, groups, 16) int32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual; with splits, (splits, num_tokens, features) float32
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    tokens: tl.constexpr,
    tiles: tl.constexpr,
    splits: tl.constexpr,
    scaled: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / 16 / tiles, num_tokens / tokens, splits).

    A block's product is scaled and then added; ``scaled``, the weights are scaled before: fewer registers, but a
    rounding more. Each turn touches the sum: else Triton would let ``wgmma`` run on into the next one, which writes the
    registers it still reads (seen in 3.6: wrong results).
    """
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    share: tl.constexpr = (blocks + splits - 1) // splits
    program = tl.program_id(0)
    split = tl.program_id(2)
    tile = tiles_of(program, features, tiles, gated)
    token = tl.program_id(1) * tokens + tl.arange(0, tokens)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    words = words_ptr + tile[None, :, None, None] * (blocks * 256) + half + tl.arange(0, 128)[None, None, None, :]
    at = tl.arange(0, span)
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64) * inputs
    pdl_wait(enable_pdl)
    acc = tl.zeros((tiles * 16, tokens), dtype=tl.float32)
    for block in tl.range(split * share, tl.minimum(split * share + share, blocks), num_stages=stages):
        p = tl.load(words + block * 256)
        groups = load_groups(groups_ptr, tile, block + tl.arange(0, 1), inputs, group, span)
        if inputs % span == 0:
            x = tl.load(x_ptr + block * span + x_row[None, :] + at[:, None])
        else:
            inside = (block * span + at < inputs)[:, None]
            x = tl.load(x_ptr + block * span + x_row[None, :] + at[:, None], mask=inside, other=0.0)
        w = tl.reshape(unpack(p, groups, bits, gated, scaled, native, x.dtype), (tiles * 16, span))
        if scaled:
            acc = tl.dot(w, x, acc, input_precision="ieee")
            if native:
                acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)
        else:
            scale = tl.reshape(scales_of(groups[0], tiles, 1, gated), (tiles * 16, 1))
            acc += tl.dot(w, x, input_precision="ieee") * scale
    pdl_launch_dependents(enable_pdl)
    if splits == 1:
        if has_bias:
            row, _ = rows_of(program, features, tiles, gated)
            acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        finish(acc, program, token, num_tokens, residual_ptr, out_ptr, features, tiles, gated, has_residual)
    else:
        row, mine = rows_of(program, features, tiles, gated)
        out = out_ptr + split.to(tl.int64) * num_tokens * features + token.to(tl.int64)[None, :] * features
        tl.store(out + row[:, None], acc, mask=mine[:, None] & (token < num_tokens)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    parts_ptr,  # (splits, num_tokens, features) float32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (width / block, num_tokens). Splits are added in order."""
    width: tl.constexpr = features // 2 if gated else features
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < width
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    y = _added(parts_ptr, bias_ptr, token, num_tokens, at, inside, features, splits, has_bias)
    if gated:
        up = _added(parts_ptr, bias_ptr, token, num_tokens, at + width, inside, features, splits, has_bias)
        y = y / (1.0 + tl.exp(-y)) * up
    if has_residual:
        y += tl.load(residual_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _added(
    parts_ptr, bias_ptr, token, num_tokens, at, inside, features: tl.constexpr, splits: tl.constexpr,
    has_bias: tl.constexpr,
):  # fmt: skip
    y = tl.load(parts_ptr + token * features + at, mask=inside, other=0.0)
    for split in tl.static_range(1, splits):
        y += tl.load(parts_ptr + (token + split * num_tokens) * features + at, mask=inside, other=0.0)
    if has_bias:
        y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def dequantize_kernel(
    words_ptr,  # (tiles, blocks, 256) int32
    groups_ptr,  # (tiles, groups, 16) int32
    out_ptr,  # (features, inputs)
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    ways: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / 16, blocks / ways)."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    tile = tl.program_id(0) + tl.arange(0, 1)
    block = tl.program_id(1) * ways + tl.arange(0, ways)
    held = tl.minimum(block, blocks - 1)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    at = (tile[None, :, None, None] * blocks + held[:, None, None, None]) * 256
    p = tl.load(words_ptr + at + half + tl.arange(0, 128)[None, None, None, :], eviction_policy="evict_first")
    groups = load_groups(groups_ptr, tile, held, inputs, group, span)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    w = unpack(p, groups, bits, False, True, native, out_ptr.dtype.element_ty)
    row = tl.program_id(0) * 16 + tl.arange(0, 16)[None, :, None]
    k = block[:, None, None] * span + tl.arange(0, span)[None, None, :]
    tl.store(out_ptr + row.to(tl.int64) * inputs + k, w, mask=(row < features) & (k < inputs))
