"""Linear layers of a few tokens with weights of 4 or 8 bits in groups (W4A16, W8A16) on the tensor cores.

Algorithm: as ``quire.core.ops.kernels.gemm_small_m``: K is split among the ``slice_k`` warps of a program, whose
products are added at the end (sliced K), without a second kernel and without atomics. A warp unpacks a block of
``span`` inputs (``int4_words`` has the order in memory) and multiplies it; ``unroll_k`` blocks are loaded before the
first is used.
Where a group is a block or more, its scale multiplies the product, else the weights.
The order of every sum depends on the layer's shape and on ``block_m`` alone.

Shapes: ``x`` (M, K), words (N / 16, K / span, 256) int32, ``out`` (M, N), or (M, N / 2) where gated; M <= ``block_m``.
Grid: ``(N / 16 / tiles,)``.
Shared memory: ``stages`` turns of words and tokens. Registers: an accumulator (tiles * 16, block_m) in each warp.
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
from quire.sdk.ops import (
    add_adapters,
    add_low_rank,
    find_adapters,
    load_adapters,
    pdl_launch_dependents,
    pdl_wait,
    shrink_segments,
)

__all__ = ["int4_gemm_small_m_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])
def int4_gemm_small_m_kernel(
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
    block_m: tl.constexpr,
    tiles: tl.constexpr,
    slice_k: tl.constexpr,
    unroll_k: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    native: tl.constexpr,
    enable_pdl: tl.constexpr,
    v_ptr=None,  # of adapters, as in ``LowRankTerm``
    b_ptr=None,
    ranks_ptr=None,
    slots_ptr=None,
    low_rank: tl.constexpr = None,
    a_ptr=None,  # where programs of this launch shrink, as in ``ShrinkInProduct``; v_ptr is then what they write
    segments_ptr=None,
    num_live_ptr=None,
    tokens_ptr=None,
    active_ptr=None,
    number_ptr=None,
    in_launch: tl.constexpr = None,
):
    """Grid: (features / 16 / tiles,), behind the programs that shrink. A turn is ``unroll_k`` blocks of inputs for each
    of ``slice_k`` warps."""
    span: tl.constexpr = 512 // bits
    blocks: tl.constexpr = (inputs + span - 1) // span
    if in_launch is None:
        program = tl.program_id(0)
    else:
        if tl.program_id(0) < in_launch[0]:
            shrink_segments(
                x_ptr, x_ptr, num_tokens, v_ptr, a_ptr, ranks_ptr, segments_ptr, num_live_ptr, tokens_ptr, number_ptr,
                inputs, False, enable_pdl, low_rank, in_launch,
            )  # fmt: skip
            return
        program = tl.program_id(0) - in_launch[0]
    tile = get_tiles(program, features, tiles, gated)
    split = tl.arange(0, slice_k)
    offs_m = tl.arange(0, block_m)
    half = tl.arange(0, 2)[None, None, :, None] * 128
    words = words_ptr + tile[None, :, None, None] * (blocks * 256) + half + tl.arange(0, 128)[None, None, None, :]
    acc = tl.zeros((slice_k, tiles * 16, block_m), dtype=tl.float32)
    if in_launch is not None:
        rows, _ = get_rows(program, features, tiles, gated)
        found = find_adapters(num_tokens, slots_ptr, active_ptr, block_m)
    pdl_wait(enable_pdl)
    for first in tl.range(0, blocks, slice_k * unroll_k, num_stages=stages):
        words_of, groups_of, tokens_of = (), (), ()  # all loads of a turn before its products
        for turn in tl.static_range(unroll_k):
            block = first + turn * slice_k + split
            held = tl.minimum(block, blocks - 1)
            words_of = words_of + (tl.load(words + held[:, None, None, None] * 256, eviction_policy="evict_first"),)  # type: ignore[assignment]  # noqa: RUF005
            groups_of = groups_of + (load_groups(groups_ptr, tile, held, inputs, group, span),)  # type: ignore[assignment]  # noqa: RUF005
            offs_k = block[:, None] * span + tl.arange(0, span)[None, :]
            # beyond the last block: its words again, times tokens that are zero
            mask = (offs_k < inputs)[:, :, None] & (offs_m < num_tokens)[None, None, :]
            x = tl.load(x_ptr + offs_k[:, :, None] + offs_m[None, None, :] * inputs, mask=mask, other=0.0)
            tokens_of = tokens_of + (x,)  # type: ignore[assignment]  # noqa: RUF005
        for turn in tl.static_range(unroll_k):
            acc = _multiply(words_of[turn], groups_of[turn], tokens_of[turn], acc, group, bits, gated, native)
    pdl_launch_dependents(enable_pdl)
    if in_launch is not None:
        loaded = load_adapters(found, rows, num_tokens, v_ptr, b_ptr, ranks_ptr, features, low_rank, in_launch, gated)
    y = tl.sum(acc, axis=0)
    if in_launch is not None:
        y = add_adapters(
            y, loaded, found, rows, num_tokens, v_ptr, b_ptr, ranks_ptr, active_ptr, number_ptr, features,
            low_rank, in_launch, gated,
        )  # fmt: skip
    elif low_rank is not None:
        rows, _ = get_rows(program, features, tiles, gated)
        y = add_low_rank(y, rows, num_tokens, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank)
    if has_bias:
        offs_n, _ = get_rows(program, features, tiles, gated)
        y += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    store_output(y, program, offs_m, num_tokens, residual_ptr, out_ptr, features, tiles, gated, has_residual)


@triton.jit
def _multiply(p, groups, x, acc, group: tl.constexpr, bits: tl.constexpr, gated: tl.constexpr, native: tl.constexpr):
    """``acc`` plus a block's product. Where a group is a block or more, its scale is applied to the product."""
    if group * bits >= 512:
        w = unpack_words(p, groups, bits, gated, False, native, x.dtype)
        scale = get_scales(groups[0], p.shape[1], p.shape[0], gated)
        acc += tl.dot(w, x, input_precision="ieee") * scale
    else:
        w = unpack_words(p, groups, bits, gated, True, native, x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc
