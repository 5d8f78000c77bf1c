"""Linear layers of tens of tokens and more with weights of 4 or 8 bits in groups (W4A16, W8A16), on the tensor cores.

Algorithm: all the warps of a program work on one product over K in order. On Hopper that is ``wgmma`` with the
unpacked weights as the operand in registers and the tokens in shared memory. Where the programs are too few to fill the
GPU, K is split among ``split_k`` programs, which write float32 parts, and ``combine_split_k_kernel`` adds them in order
and applies the epilogue. ``int4_dequantize_kernel`` writes the weights out, for the library's GEMM.

Shapes: ``x`` (M, K), words (N / 16, K / span, 256) int32, ``out`` (M, N), or (M, N / 2) where gated.
Grid: ``(N / 16 / tiles, M / block_m, split_k)``.
Shared memory: ``stages`` blocks of words and of tokens, (span, block_m). Registers: the accumulator,
(tiles * 16, block_m) float32, and one block of unpacked weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.plugins.quant.kernels.int4_words import (
    get_rows,
    get_scales,
    get_tiles,
    load_groups,
    store_output,
    unpack_words,
)
from quire.sdk.ops import pdl_launch_dependents, pdl_wait

__all__ = ["combine_split_k_kernel", "int4_dequantize_kernel", "int4_gemm_medium_m_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def int4_gemm_medium_m_kernel(
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
    block_m: tl.constexpr,
    tiles: tl.constexpr,
    split_k: tl.constexpr,
    scale_weights: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
    leads: tl.constexpr = False,
):
    """Grid: (features / 16 / tiles, num_tokens / tokens, splits). ``leads``: the next kernel may start beside it.

    A block's product is scaled and then added; ``scale_weights``, the weights are scaled before: fewer registers, but a
    rounding more. Each turn touches the sum: else Triton would let ``wgmma`` run on into the next one, which writes the
    registers it still reads (seen in 3.6: wrong results).
    """
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    share: tl.constexpr = (blocks + split_k - 1) // split_k
    program = tl.program_id(0)
    split = tl.program_id(2)
    tile = get_tiles(program, features, tiles, gated)
    offs_m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    words = words_ptr + tile[None, :, None, None] * (blocks * 256) + half + tl.arange(0, 128)[None, None, None, :]
    offs_k = tl.arange(0, span)
    x_row = tl.minimum(offs_m, num_tokens - 1).to(tl.int64) * inputs
    pdl_wait(enable_pdl)
    pdl_launch_dependents(enable_pdl and leads)
    acc = tl.zeros((tiles * 16, block_m), dtype=tl.float32)
    for block in tl.range(split * share, tl.minimum(split * share + share, blocks), num_stages=stages):
        p = tl.load(words + block * 256)
        groups = load_groups(groups_ptr, tile, block + tl.arange(0, 1), inputs, group, span)
        if inputs % span == 0:
            x = tl.load(x_ptr + block * span + x_row[None, :] + offs_k[:, None])
        else:
            mask = (block * span + offs_k < inputs)[:, None]
            x = tl.load(x_ptr + block * span + x_row[None, :] + offs_k[:, None], mask=mask, other=0.0)
        w = tl.reshape(unpack_words(p, groups, bits, gated, scale_weights, native, x.dtype), (tiles * 16, span))
        if scale_weights:
            acc = tl.dot(w, x, acc, input_precision="ieee")
            if native:  # touch the sum, see above
                acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)
        else:
            scale = tl.reshape(get_scales(groups[0], tiles, 1, gated), (tiles * 16, 1))
            acc += tl.dot(w, x, input_precision="ieee") * scale
    pdl_launch_dependents(enable_pdl and not leads)
    if split_k == 1:
        if has_bias:
            offs_n, _ = get_rows(program, features, tiles, gated)
            acc += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
        store_output(acc, program, offs_m, num_tokens, residual_ptr, out_ptr, features, tiles, gated, has_residual)
    else:
        offs_n, mask_n = get_rows(program, features, tiles, gated)
        out = out_ptr + split.to(tl.int64) * num_tokens * features + offs_m.to(tl.int64)[None, :] * features
        tl.store(out + offs_n[:, None], acc, mask=mask_n[:, None] & (offs_m < num_tokens)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def combine_split_k_kernel(
    parts_ptr,  # (splits, num_tokens, features) float32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    split_k: tl.constexpr,
    block_n: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (width / block_n, num_tokens). Splits are added in order."""
    width: tl.constexpr = features // 2 if gated else features
    m = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    mask = offs_n < width
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    y = _add_splits(parts_ptr, bias_ptr, m, num_tokens, offs_n, mask, features, split_k, has_bias)
    if gated:
        up = _add_splits(parts_ptr, bias_ptr, m, num_tokens, offs_n + width, mask, features, split_k, has_bias)
        y = y / (1.0 + tl.exp(-y)) * up
    if has_residual:
        y += tl.load(residual_ptr + m * width + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * width + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits(
    parts_ptr,
    bias_ptr,
    m,
    num_tokens,
    offs_n,
    mask,
    features: tl.constexpr,
    split_k: tl.constexpr,
    has_bias: tl.constexpr,
):
    y = tl.load(parts_ptr + m * features + offs_n, mask=mask, other=0.0)
    for split in tl.static_range(1, split_k):
        y += tl.load(parts_ptr + (m + split * num_tokens) * features + offs_n, mask=mask, other=0.0)
    if has_bias:
        y += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def int4_dequantize_kernel(
    words_ptr,  # (tiles, blocks, 256) int32
    groups_ptr,  # (tiles, groups, 16) int32
    out_ptr,  # (features, inputs)
    features: tl.constexpr,
    inputs: tl.constexpr,
    group: tl.constexpr,
    bits: tl.constexpr,
    blocks_per_program: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / 16, blocks / blocks_per_program)."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    tile = tl.program_id(0) + tl.arange(0, 1)
    block = tl.program_id(1) * blocks_per_program + tl.arange(0, blocks_per_program)
    clamped = tl.minimum(block, blocks - 1)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    word_offs = (tile[None, :, None, None] * blocks + clamped[:, None, None, None]) * 256
    p = tl.load(words_ptr + word_offs + half + tl.arange(0, 128)[None, None, None, :], eviction_policy="evict_first")
    groups = load_groups(groups_ptr, tile, clamped, inputs, group, span)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    w = unpack_words(p, groups, bits, False, True, native, out_ptr.dtype.element_ty)
    offs_n = tl.program_id(0) * 16 + tl.arange(0, 16)[None, :, None]
    k = block[:, None, None] * span + tl.arange(0, span)[None, None, :]
    tl.store(out_ptr + offs_n.to(tl.int64) * inputs + k, w, mask=(offs_n < features) & (k < inputs))
