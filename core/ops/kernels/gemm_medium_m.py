"""Linear layers of tens of tokens in bfloat16 or float16: one tile of the tensor cores' product a program.

Algorithm: ``out[m, n] = epilogue(sum over k of x[m, k] * weight[n, k])``, M the tokens, N the output features and K
the inputs. The weight is the first, tall operand (the product is transposed, "swap AB"), since M is small beside N.
All the warps of a program work on one product over K in order, so the order of every sum is fixed by the shapes.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated; M at most ``block_m``.
Grid: ``(N / block_n,)``; every program reads every token once.
Shared memory: ``stages`` tiles of the weight, (block_n, block_k), and of the tokens, (block_k, block_m).
Registers: the accumulator, (block_n, block_m) float32.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import Epilogue, get_weight_rows, pack_epilogue, store_gemm_output
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = ["launch_gemm_medium_m"]


def launch_gemm_medium_m(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallBatchGemm``.

    At most ``block_m`` (8 at least) tokens. A norm is never part of the kernel: launches say ``separate_norm``.
    """
    assert norm is None, "launches of this kernel say separate_norm"
    features, inputs = weight.shape
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    gemm_medium_m_kernel[(triton.cdiv(features, block_n),)](
        x,
        weight,
        bias,
        residual,
        out,
        x.shape[0],
        features=features,
        inputs=inputs,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        stages=num_stages,
        num_warps=num_warps,
        **options,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def gemm_medium_m_kernel(
    x_ptr,  # (num_tokens, inputs)
    weight_ptr,  # (features, inputs)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    num_tokens,
    features: tl.constexpr,
    inputs: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (features / block_n,)."""
    tile = tl.program_id(0)
    offs_n = get_weight_rows(tile, features, block_n, gated)
    offs_m = tl.arange(0, block_m)
    offs_k = tl.arange(0, block_k)
    x_row = tl.minimum(offs_m, num_tokens - 1) * inputs  # a clamped row needs no mask, and is never stored
    weights = weight_ptr + offs_n.to(tl.int64)[:, None] * inputs + offs_k[None, :]
    pdl_wait(enable_pdl)
    acc = tl.zeros((block_n, block_m), dtype=tl.float32)
    even_k: tl.constexpr = inputs % block_k == 0
    for k in tl.range(0, inputs, block_k, num_stages=stages):
        if even_k:
            w = tl.load(weights + k, eviction_policy="evict_first")  # read once: leave L2 to the tokens
            x = tl.load(x_ptr + k + x_row[None, :] + offs_k[:, None])
        else:
            mask_k = k + offs_k < inputs
            w = tl.load(weights + k, mask=mask_k[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + k + x_row[None, :] + offs_k[:, None], mask=mask_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    pdl_launch_dependents(enable_pdl)
    if has_bias:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    store_gemm_output(acc, tile, offs_m, num_tokens, residual_ptr, out_ptr, features, block_n, gated, has_residual)
