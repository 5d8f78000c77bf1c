"""Linear layers of a few tokens with weights of 8 bits (FP8 e4m3 or INT8) on the 16-bit tensor cores: W8A16.

Algorithm: as ``quire.core.ops.kernels.gemm_small_m``: K is split among the warps of a program, whose products are added
at the end. The weights are widened in registers, each is read once, and activations are not quantized. A scale for
each row multiplies the sum; a scale for each 128x128 block multiplies each partial product, and ``block_k`` is 128.
The order of every sum depends on the layer's shape and on ``block_m`` alone.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated; M at most ``block_m``.
Grid: ``(N / block_n,)``.
Shared memory: ``stages`` tiles of each warp: the weight's (block_n, block_k) bytes and the tokens' (block_k, block_m).
Registers: an accumulator (block_n, block_m) float32 in each warp.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.sdk.ops import (
    Epilogue,
    add_adapters,
    add_low_rank,
    add_shrink,
    find_adapters,
    get_weight_rows,
    load_adapters,
    pack_epilogue,
    pdl_launch_dependents,
    pdl_wait,
    shrink_segments,
    store_gemm_output,
)

__all__ = ["launch_fp8_gemm_small_m"]


def launch_fp8_gemm_small_m(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    block_m: int,
    block_n: int,
    block_k: int,
    slice_k: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense.

    ``scale`` float32, (features,) or (features / 128, inputs / 128), both rounded up; then ``block_k`` is 128. At most
    ``block_m`` (8 at least) tokens. A program has ``slice_k`` warps, each with ``block_k`` inputs at a time.
    """
    features, inputs = weight.shape
    assert scale.dim() == 1 or block_k == 128
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    shrink_programs = add_shrink(options, inputs, block_m, epilogue)
    fp8_gemm_small_m_kernel[(shrink_programs + triton.cdiv(features, block_n),)](
        x,
        weight,
        scale,
        bias,
        residual,
        out,
        x.shape[0],
        features=features,
        inputs=inputs,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        slice_k=slice_k,
        stages=num_stages,
        scale_blocks=scale.shape[1] if scale.dim() == 2 else 0,
        num_warps=slice_k,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_gemm_small_m_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,), or (features / 128, blocks)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    slice_k: tl.constexpr,
    stages: tl.constexpr,
    scale_blocks: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
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
    """Grid: (features / block_n,), behind the programs that shrink."""
    if in_launch is None:
        tile = tl.program_id(0)
    else:
        if tl.program_id(0) < in_launch[0]:
            shrink_segments(
                x_ptr, x_ptr, num_tokens, v_ptr, a_ptr, ranks_ptr, segments_ptr, num_live_ptr, tokens_ptr, number_ptr,
                inputs, False, enable_pdl, low_rank, in_launch,
            )  # fmt: skip
            return
        tile = tl.program_id(0) - in_launch[0]
    offs_n = get_weight_rows(tile, features, block_n, gated)
    offs_m = tl.arange(0, block_m)
    split = tl.arange(0, slice_k)
    offs_k = split[:, None] * block_k + tl.arange(0, block_k)[None, :]  # (slice_k, block_k)
    w_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :, None] * inputs + offs_k[:, None, :]
    x_ptrs = x_ptr + offs_m[None, None, :] * inputs + offs_k[:, :, None]
    mask_m = (offs_m < num_tokens)[None, None, :]
    if in_launch is not None:
        found = find_adapters(num_tokens, slots_ptr, active_ptr, block_m)
    pdl_wait(enable_pdl)
    acc = tl.zeros((slice_k, block_n, block_m), dtype=tl.float32)
    even_k: tl.constexpr = inputs % (slice_k * block_k) == 0
    for k in tl.range(0, inputs, slice_k * block_k, num_stages=stages):
        if even_k:
            w = tl.load(w_ptrs + k, eviction_policy="evict_first")
            x = tl.load(x_ptrs + k, mask=mask_m & (offs_k >= 0)[:, :, None], other=0.0)
        else:
            mask_k = k + offs_k < inputs
            w = tl.load(w_ptrs + k, mask=mask_k[:, None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + k, mask=mask_m & mask_k[:, :, None], other=0.0)
        w = w.to(tl.float32).to(x.dtype)  # exact: 8 bits fit into float16's and bfloat16's significand
        if scale_blocks:
            group = tl.minimum(k // 128 + split, scale_blocks - 1)  # a slice is a block of 128 inputs
            s = tl.load(scale_ptr + (offs_n // 128 * scale_blocks)[None, :] + group[:, None])  # (slice_k, block_n)
            acc += tl.dot(w, x) * s[:, :, None]
        else:
            acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)
    if in_launch is not None:
        loaded = load_adapters(found, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, features, low_rank, in_launch, gated)
    y = tl.sum(acc, axis=0)  # (rows, tokens)
    if not scale_blocks:
        y *= tl.load(scale_ptr + offs_n)[:, None]
    if in_launch is not None:
        y = add_adapters(
            y, loaded, found, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, active_ptr, number_ptr, features,
            low_rank, in_launch, gated,
        )  # fmt: skip
    elif low_rank is not None:
        y = add_low_rank(y, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank)
    if has_bias:
        y += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    store_gemm_output(y, tile, offs_m, num_tokens, residual_ptr, out_ptr, features, block_n, gated, has_residual)
