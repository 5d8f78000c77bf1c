"""Linear layers of tens to hundreds of tokens, weights and activations of 8 bits (FP8 e4m3 or INT8): W8A8.

Algorithm: ``out[m, n] = epilogue(x_scale[m] * scale[n] * sum over k of x[m, k] * weight[n, k])`` on the 8-bit tensor
cores, accumulated in float32 or int32. With scales by block, the product of each 128 inputs is scaled and then added.
``wgmma`` wants 64 rows or more of its first operand: the weight's, or, with ``x_is_lhs``, the tokens'; then a tile may
have as few as 16 rows of the weight, and the programs fill the GPU without splitting K.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated; ``block_k`` divides K.
Grid: ``(M / block_m, N / block_n)``: programs that share weights run at the same time.
Shared memory: ``stages`` tiles of the weight, (block_n, block_k), and of the tokens, (block_m, block_k), in bytes.
Registers: the accumulator, (block_n, block_m).
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.sdk.ops import Epilogue, get_weight_rows, pack_epilogue, pdl_launch_dependents, pdl_wait, store_gemm_output

__all__ = ["launch_fp8_gemm_medium_m"]


def launch_fp8_gemm_medium_m(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    x_scale: Tensor,
    block_m: int,
    block_n: int,
    block_k: int,
    x_is_lhs: bool = False,
    num_warps: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense, of one
    type; ``block_k`` divides ``inputs``.

    ``scale`` float32, (features,) or (features / 128, inputs / 128), both rounded up; then ``block_k`` is 128.
    ``x_scale`` float32, (num_tokens, 1) or (1,), or (num_tokens, inputs / 128) of any second stride where scales are by
    block. A program takes ``block_n`` rows of the weight and ``block_m`` tokens: 8 at least, 64 where ``x_is_lhs``, as
    the first operand.
    """
    features, inputs = weight.shape
    assert inputs % block_k == 0 and (scale.dim() == 1 or block_k == 128) and x.dtype == weight.dtype
    bias, residual, options = pack_epilogue(scale, bias, **epilogue)
    fp8_gemm_medium_m_kernel[(triton.cdiv(x.shape[0], block_m), triton.cdiv(features, block_n))](
        x,
        weight,
        scale,
        x_scale,
        bias,
        residual,
        out,
        x.shape[0],
        x_scale.stride(-1),
        features=features,
        inputs=inputs,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        x_is_lhs=x_is_lhs,
        stages=num_stages,
        scale_blocks=scale.shape[1] if scale.dim() == 2 else 0,
        one_x_scale=x_scale.numel() == 1,
        x_scale_groups=x_scale.dim() == 2 and x_scale.shape[1] > 1,
        num_warps=num_warps,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens", "x_scale_group"])
def fp8_gemm_medium_m_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    scale_ptr,  # (features,), or (features / 128, blocks)
    x_scale_ptr,  # (num_tokens,) or (1,), or (blocks, x_scale_group), a group's tokens side by side
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    x_scale_group,
    features: tl.constexpr,
    inputs: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    x_is_lhs: tl.constexpr,
    stages: tl.constexpr,
    scale_blocks: tl.constexpr,
    one_x_scale: tl.constexpr,
    x_scale_groups: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (num_tokens / tokens, features / rows): programs that share weights run at the same time."""
    tile = tl.program_id(1)
    offs_n = get_weight_rows(tile, features, block_n, gated)
    offs_m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    offs_k = tl.arange(0, block_k)
    x_row, w_row = offs_m.to(tl.int64) * inputs, offs_n.to(tl.int64) * inputs
    if x_is_lhs:
        x_ptrs, w_ptrs = x_ptr + x_row[:, None] + offs_k[None, :], weight_ptr + w_row[None, :] + offs_k[:, None]
        mask_m = (offs_m < num_tokens)[:, None] & (offs_k >= 0)[None, :]
    else:
        x_ptrs, w_ptrs = x_ptr + x_row[None, :] + offs_k[:, None], weight_ptr + w_row[:, None] + offs_k[None, :]
        mask_m = (offs_m < num_tokens)[None, :] & (offs_k >= 0)[:, None]
    pdl_wait(enable_pdl)
    # INT8 products are whole numbers, added exactly; a scale by block makes them float32
    acc_dtype: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 and not scale_blocks else tl.float32
    acc = tl.zeros((block_m, block_n) if x_is_lhs else (block_n, block_m), dtype=acc_dtype)
    for k in tl.range(0, inputs, block_k, num_stages=stages):
        w = tl.load(w_ptrs + k, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=mask_m, other=0.0)
        if scale_blocks:
            s = tl.load(scale_ptr + offs_n // 128 * scale_blocks + k // 128)
            part = (tl.dot(x, w) * s[None, :]) if x_is_lhs else (tl.dot(w, x) * s[:, None])
            if x_scale_groups:
                x_s = tl.load(x_scale_ptr + k // 128 * x_scale_group + offs_m, mask=offs_m < num_tokens, other=0.0)
                part *= x_s[:, None] if x_is_lhs else x_s[None, :]
            acc += part
        elif x_is_lhs:
            acc = tl.dot(x, w, acc, out_dtype=acc_dtype)
        else:
            acc = tl.dot(w, x, acc, out_dtype=acc_dtype)
    pdl_launch_dependents(enable_pdl)
    y = (tl.trans(acc) if x_is_lhs else acc).to(tl.float32)
    if not scale_blocks:
        y *= tl.load(scale_ptr + offs_n)[:, None]
    if one_x_scale:
        y *= tl.load(x_scale_ptr)
    elif not x_scale_groups:
        y *= tl.load(x_scale_ptr + offs_m, mask=offs_m < num_tokens, other=0.0)[None, :]
    if has_bias:
        y += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    store_gemm_output(y, tile, offs_m, num_tokens, residual_ptr, out_ptr, features, block_n, gated, has_residual)
