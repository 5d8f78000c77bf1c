"""Linear layers of a few tokens with weights of 8 bits (FP8 e4m3 or INT8), without tensor cores: W8A16.

Algorithm: as ``quire.core.ops.kernels.gemv``, with ``scale[n]`` (or the scale of a 128x128 block) behind the product.
Weights are widened in registers; activations are not quantized. Weights are loaded 16 bytes at a time. In
``fp8_gemv_kernel`` they travel as 32-bit words, since bytes that are carried from one turn of the loop to the next are
taken apart and put together again. The order of every sum depends on the layer's shape alone.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated; K a multiple of 16.
Grid: ``(N / block_n / tiles_per_program,)`` and, for ``fp8_gemv_k_loop_kernel``, ``(N / block_n,)``.
Registers: a tile of weights and the next one; ``fp8_gemv_kernel`` also all tokens, normed if need be.
"""

from __future__ import annotations

from typing import Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.sdk.ops import (
    Epilogue,
    add_token_shrink,
    find_adapter,
    get_tile_rows,
    get_weight_rows,
    load_low_rank,
    pack_gemm_operands,
    pdl_launch_dependents,
    pdl_wait,
    receive_rows,
    shrink_rows,
    store_gemm_output,
    store_token,
)

__all__ = ["launch_fp8_gemv", "launch_fp8_gemv_k_loop"]


def launch_fp8_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    norm: tuple[Tensor, float] | None = None,
    block_m: int,
    block_n: int,
    tiles_per_program: int,
    num_warps: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight`` (features, inputs), dense.

    ``scale`` (features,) float32. At most ``block_m`` tokens. A program takes ``tiles_per_program`` tiles of
    ``block_n`` rows, one after the other. ``inputs`` is a multiple of 16.
    """
    features, inputs = weight.shape
    operands, options = pack_gemm_operands(x, weight, bias, out, norm, **epilogue)
    shrink_programs = add_token_shrink(options, inputs, num_warps, epilogue)
    fp8_gemv_kernel[(shrink_programs + triton.cdiv(features, block_n * tiles_per_program),)](
        x,
        weight.view(torch.int32),
        scale,
        *operands,
        x.shape[0],
        vectors=triton.next_power_of_2(inputs // 16),
        block_m=block_m,
        block_n=block_n,
        tiles_per_program=tiles_per_program,
        is_int8=weight.dtype == torch.int8,
        num_warps=num_warps,
        **options,
    )


def launch_fp8_gemv_k_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale: Tensor,
    norm: tuple[Tensor, float] | None = None,
    block_n: int,
    block_k: int,
    num_warps: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """As ``launch_fp8_gemv``, for one token; a program takes ``block_n`` rows, ``block_k`` inputs at a time.

    ``scale`` is (features,), or (features / 128, inputs / 128), both rounded up.
    """
    operands, options = pack_gemm_operands(x, weight, bias, out, norm, **epilogue)
    shrink_programs = add_token_shrink(options, weight.shape[1], num_warps, epilogue)
    fp8_gemv_k_loop_kernel[(shrink_programs + triton.cdiv(weight.shape[0], block_n),)](
        x,
        weight,
        scale,
        *operands,
        block_n=block_n,
        block_k=block_k,
        scale_blocks=scale.shape[1] if scale.dim() == 2 else 0,
        num_warps=num_warps,
        **options,
    )


@triton.jit
def unpack_bytes(words, is_int8: tl.constexpr):
    """Four 8-bit numbers of each word, in order: (a, b, c) int32 -> (a, b, 4 c) float32."""
    low, high = tl.join(words, words >> 16), tl.join(words >> 8, words >> 24)
    parts = tl.join(low, high)  # (a, b, c, 2, 2)
    octets = tl.reshape(parts, (words.shape[0], words.shape[1], 4 * words.shape[2])).to(tl.int8)
    return octets.to(tl.float32) if is_int8 else octets.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_gemv_kernel(
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
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    tiles_per_program: tl.constexpr,
    is_int8: tl.constexpr,
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
    number_ptr=None,
    in_launch: tl.constexpr = None,
):
    """Grid: (features / block_n / tiles_per_program,), behind the programs that shrink."""
    if in_launch is None:
        first = tl.program_id(0) * tiles_per_program
    else:
        if tl.program_id(0) < in_launch[0]:
            shrink_rows(
                x_ptr, norm_ptr, v_ptr, a_ptr, ranks_ptr, slots_ptr, number_ptr, inputs, has_norm, enable_pdl,
                low_rank, in_launch,
            )  # fmt: skip
            return
        first = (tl.program_id(0) - in_launch[0]) * tiles_per_program
    vector = tl.arange(0, vectors)[:, None]
    word = vector * 4 + tl.arange(0, 4)[None, :]
    mask_words = (word < inputs // 4)[None, :, :]
    weights = weight_ptr + word[None, :, :]
    first_row = get_weight_rows(first, features, block_n, gated).to(tl.int64)[:, None, None]
    w = tl.load(weights + first_row * (inputs // 4), mask=mask_words, other=0, eviction_policy="evict_first")
    offs_k = vector * 16 + tl.arange(0, 16)[None, :]
    mask_k = offs_k < inputs
    if has_norm:
        g = tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if in_launch is not None:  # as in ``gemv_kernel``
        num_rows: tl.constexpr = tiles_per_program * block_n
        rows: tl.constexpr = triton.next_power_of_2(tiles_per_program) * block_n
        offs_rows = get_tile_rows(first * block_n, rows, features, gated)
        part_of_row, ranks, b_rows = find_adapter(offs_rows, slots_ptr, ranks_ptr, b_ptr, features, low_rank)
        ys = tl.zeros((rows // block_n, block_n), dtype=tl.float32)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    xs, scales = (), ()
    for token in tl.static_range(block_m):
        x_row = x_ptr + tl.minimum(token, num_tokens - 1) * inputs
        x = tl.load(x_row + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if has_norm:
            norm_scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1)) / inputs + eps)
            x = x * norm_scale * g
            scales = scales + (norm_scale,)  # type: ignore[assignment]  # noqa: RUF005
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    adds_at_once: tl.constexpr = low_rank is not None and in_launch is None
    if adds_at_once:
        offs_r = tl.arange(0, triton.next_power_of_2(low_rank[1]))
    for turn in range(tiles_per_program):
        tile = first + turn
        next_row = get_weight_rows(tile + 1, features, block_n, gated).to(tl.int64)[:, None, None]
        w_next = tl.load(
            weights + next_row * (inputs // 4),
            mask=mask_words & (turn + 1 < tiles_per_program),
            other=0,
            eviction_policy="evict_first",
        )
        w_f32 = unpack_bytes(w, is_int8)
        offs_n = get_weight_rows(tile, features, block_n, gated)
        scale = tl.load(scale_ptr + offs_n)
        for token in tl.static_range(block_m):
            if adds_at_once:
                v, b = load_low_rank(
                    offs_n, token, num_tokens, offs_r, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank
                )
            y = tl.sum(tl.sum(w_f32 * xs[token][None, :, :], axis=2), axis=1) * scale
            if adds_at_once:
                term = tl.sum(v * b, axis=1)
                y += term * scales[token] if has_norm else term
            if in_launch is not None:
                ys = tl.where((tl.arange(0, ys.shape[0]) == turn)[:, None], y[None, :], ys)
            else:
                if has_bias:
                    y += tl.load(bias_ptr + offs_n).to(tl.float32)
                store_gemm_output(
                    y[:, None],
                    tile,
                    token + tl.zeros((1,), dtype=tl.int32),
                    num_tokens,
                    residual_ptr,
                    out_ptr,
                    features,
                    block_n,
                    gated,
                    has_residual,
                )
        w = w_next
    if in_launch is not None:
        term = receive_rows(part_of_row, ranks, b_rows, v_ptr, number_ptr, low_rank, in_launch)
        if has_norm:
            term *= scales[0]  # type: ignore[misc]
        y = tl.reshape(ys, (rows,)) + term
        if has_bias:
            y += tl.load(bias_ptr + offs_rows).to(tl.float32)
        store_token(y, first * block_n, num_rows, residual_ptr, out_ptr, features, gated, has_residual)


@triton.jit
def fp8_gemv_k_loop_kernel(
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
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    scale_blocks: tl.constexpr,
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
    number_ptr=None,
    in_launch: tl.constexpr = None,
):
    """Grid: (features / block_n,), behind the programs that shrink. The norm is folded in as in ``gemm_small_m``:
    squares are summed beside products."""
    if in_launch is None:
        tile = tl.program_id(0)
    else:
        if tl.program_id(0) < in_launch[0]:
            shrink_rows(
                x_ptr, norm_ptr, v_ptr, a_ptr, ranks_ptr, slots_ptr, number_ptr, inputs, has_norm, enable_pdl,
                low_rank, in_launch,
            )  # fmt: skip
            return
        tile = tl.program_id(0) - in_launch[0]
    offs_n = get_weight_rows(tile, features, block_n, gated)
    offs_k = tl.arange(0, block_k // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    weights = weight_ptr + offs_n.to(tl.int64)[:, None, None] * inputs + offs_k[None, :, :]
    w = tl.load(weights, mask=(offs_k < inputs)[None, :, :], other=0.0, eviction_policy="evict_first")
    if in_launch is not None:
        part_of_row, ranks, b_rows = find_adapter(offs_n, slots_ptr, ranks_ptr, b_ptr, features, low_rank)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    if low_rank is not None and in_launch is None:
        offs_r = tl.arange(0, triton.next_power_of_2(low_rank[1]))
        v, b = load_low_rank(offs_n, 0, 1, offs_r, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank)
    acc = tl.zeros((block_n, block_k // 16), dtype=tl.float32)
    squares = tl.zeros((block_k // 16,), dtype=tl.float32)
    for k in tl.static_range(0, inputs, block_k):  # unrolled, so that the last turn loads nothing ahead
        mask_k = k + offs_k < inputs
        x = tl.load(x_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        w_next = w
        if k + block_k < inputs:
            next_mask = (k + block_k + offs_k < inputs)[None, :, :]
            w_next = tl.load(weights + (k + block_k), mask=next_mask, other=0.0, eviction_policy="evict_first")
        if has_norm:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        part = tl.sum(w.to(tl.float32) * x[None, :, :], axis=2)
        if scale_blocks:
            group = tl.minimum(k // 128 + tl.arange(0, block_k // 16) // 8, scale_blocks - 1)
            part *= tl.load(scale_ptr + (offs_n // 128 * scale_blocks)[:, None] + group[None, :])
        acc += part
        w = w_next
    y = tl.sum(acc, axis=1)
    if not scale_blocks:
        y *= tl.load(scale_ptr + offs_n)
    if in_launch is not None:
        y += receive_rows(part_of_row, ranks, b_rows, v_ptr, number_ptr, low_rank, in_launch)
    elif low_rank is not None:
        y += tl.sum(v * b, axis=1)
    if has_norm:
        y *= tl.rsqrt(tl.sum(squares) / inputs + eps)
    if has_bias:
        y += tl.load(bias_ptr + offs_n).to(tl.float32)
    store_gemm_output(
        y[:, None],
        tile,
        tl.zeros((1,), dtype=tl.int32),
        1,
        residual_ptr,
        out_ptr,
        features,
        block_n,
        gated,
        has_residual,
    )
