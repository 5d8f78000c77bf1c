"""Linear layers of a few tokens in bfloat16 or float16 on the tensor cores: each weight is read once, for all tokens.

Algorithm: ``out[m, n] = epilogue(sum over k of x[m, k] * weight[n, k])``, M the tokens, N the output features and K
the inputs. K is split among the ``slice_k`` warps of a program, each with a product of its own, and the products are
added at the end (CUTLASS's sliced K), without a second kernel and without atomics. So the order of every sum depends
on the layer's shape and on ``block_m`` alone. An RMS norm before the layer may be folded in: with ``s = 1 /
sqrt(mean(x^2) + eps)``, ``W (g * x * s) = s * W (g * x)``, and the squares are summed beside the products.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated; M at most ``block_m``.
Grid: ``(N / block_n,)``.
Shared memory: ``stages`` tiles of each warp: the weight's (block_n, block_k) and the tokens' (block_k, block_m).
Registers: an accumulator (block_n, block_m) float32 in each warp.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import (
    Epilogue,
    add_low_rank,
    get_weight_rows,
    pack_gemm_operands,
    store_gemm_output,
)
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.core.ops.kernels.shrink_in_product import (
    add_adapters,
    add_shrink,
    find_adapters,
    load_adapters,
    shrink_segments,
)

__all__ = ["launch_gemm_small_m"]


def launch_gemm_small_m(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    block_m: int,
    block_n: int,
    block_k: int,
    slice_k: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallBatchGemm``.

    At most ``block_m`` (8 at least) tokens. A program has ``slice_k`` warps, each with ``block_k`` inputs at a time.
    """
    operands, options = pack_gemm_operands(x, weight, bias, out, norm, **epilogue)
    shrink_programs = add_shrink(options, x.shape[1], block_m, epilogue)
    gemm_small_m_kernel[(shrink_programs + triton.cdiv(weight.shape[0], block_n),)](
        x,
        weight,
        *operands,
        x.shape[0],
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        slice_k=slice_k,
        stages=num_stages,
        num_warps=slice_k,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def gemm_small_m_kernel(
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
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    slice_k: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
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
                x_ptr, norm_ptr, num_tokens, v_ptr, a_ptr, ranks_ptr, segments_ptr, num_live_ptr, tokens_ptr,
                number_ptr, inputs, has_norm, enable_pdl, low_rank, in_launch,
            )  # fmt: skip
            return
        tile = tl.program_id(0) - in_launch[0]
    offs_n = get_weight_rows(tile, features, block_n, gated)
    offs_m = tl.arange(0, block_m)
    offs_k = tl.arange(0, slice_k)[:, None] * block_k + tl.arange(0, block_k)[None, :]  # (slice_k, block_k)
    mask_m = (offs_m < num_tokens)[None, None, :]
    weights = weight_ptr + offs_n.to(tl.int64)[None, :, None] * inputs + offs_k[:, None, :]
    if in_launch is not None:
        found = find_adapters(num_tokens, slots_ptr, active_ptr, block_m)
    pdl_wait(enable_pdl)  # x is what the kernel before wrote
    acc = tl.zeros((slice_k, block_n, block_m), dtype=tl.float32)
    squares = tl.zeros((slice_k, block_k, block_m), dtype=tl.float32)  # dropped by the compiler without a norm
    even_k: tl.constexpr = inputs % (slice_k * block_k) == 0
    for k in tl.range(0, inputs, slice_k * block_k, num_stages=stages):
        if even_k:
            w = tl.load(weights + k, eviction_policy="evict_first")  # read once: leave L2 to the tokens
            x = tl.load(x_ptr + k + offs_m[None, None, :] * inputs + offs_k[:, :, None], mask=mask_m, other=0.0)
        else:
            mask_k = k + offs_k < inputs
            w = tl.load(weights + k, mask=mask_k[:, None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(
                x_ptr + k + offs_m[None, None, :] * inputs + offs_k[:, :, None],
                mask=mask_k[:, :, None] & mask_m,
                other=0.0,
            )
        if has_norm:
            x_f32 = x.to(tl.float32)
            squares += x_f32 * x_f32
            g = tl.load(norm_ptr + k + offs_k, mask=k + offs_k < inputs, other=0.0).to(tl.float32)
            x = (x_f32 * g[:, :, None]).to(x.dtype)
        acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)  # the next kernel's weights may load during the epilogue
    if in_launch is not None:
        loaded = load_adapters(found, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, features, low_rank, in_launch, gated)
    y = tl.sum(acc, axis=0)  # (rows, tokens)
    if in_launch is not None:
        y = add_adapters(
            y, loaded, found, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, active_ptr, number_ptr, features,
            low_rank, in_launch, gated,
        )  # fmt: skip
    elif low_rank is not None:
        y = add_low_rank(y, offs_n, num_tokens, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank)
    if has_norm:
        y *= tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / inputs + eps)[None, :]
    if has_bias:
        y += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    store_gemm_output(y, tile, offs_m, num_tokens, residual_ptr, out_ptr, features, block_n, gated, has_residual)
