"""Linear layers of one or two tokens in bfloat16 or float16, without tensor cores: a program takes whole rows of N.

Algorithm: ``out[m, n] = epilogue(sum over k of x[m, k] * weight[n, k])`` in float32. Nothing is split among programs
and nothing is added twice, so the order of every sum depends on the layer's shape alone. Weights go from memory to
registers in 16-byte loads, those of the next tile while one is multiplied. The RMS norm before the layer is computed
by every program for itself.
- ``gemv_kernel`` keeps the tokens in registers and loops over ``tiles_per_program`` tiles of ``block_n`` rows.
- ``gemv_k_loop_kernel`` is for rows too long for that: one token, one tile of rows, a loop over K in ``block_k``.

Shapes: ``x`` (M, K), ``weight`` (N, K), ``out`` (M, N), or (M, N / 2) where gated.
Grid: ``(N / block_n / tiles_per_program,)`` and ``(N / block_n,)``.
Registers: a tile of weights and the next one; ``gemv_kernel`` also all tokens. Shared memory: the reductions alone.
"""

from __future__ import annotations

from typing import Any, Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.linear_epilogue import (
    Epilogue,
    get_tile_rows,
    get_weight_rows,
    load_low_rank,
    pack_gemm_operands,
    store_gemm_output,
    store_token,
)
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.core.ops.kernels.shrink_in_gemv import (
    add_token_shrink,
    find_adapter,
    receive_rows,
    shrink_rows,
)

__all__ = ["launch_gemv", "launch_gemv_k_loop"]

_VECTOR = tl.constexpr(8)


def launch_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    block_m: int,
    block_n: int,
    tiles_per_program: int,
    num_warps: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs) and ``weight``, dense; see ``SmallBatchGemm``.

    At most ``block_m`` tokens. A program takes ``tiles_per_program`` tiles of ``block_n`` rows, one after the other.
    """
    features, inputs = weight.shape
    operands, options = pack_gemm_operands(x, weight, bias, out, norm, **epilogue)
    vectors = triton.next_power_of_2(triton.cdiv(inputs, 8))
    shrink_programs = add_token_shrink(options, x.shape[1], num_warps, epilogue)
    gemv_kernel[(shrink_programs + triton.cdiv(features, block_n * tiles_per_program),)](
        x,
        weight,
        *operands,
        x.shape[0],
        vectors=vectors,
        block_m=block_m,
        block_n=block_n,
        tiles_per_program=tiles_per_program,
        num_warps=num_warps,
        maxnreg=_get_max_registers(options, num_warps),
        **options,
    )


def launch_gemv_k_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    block_n: int,
    block_k: int,
    num_warps: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """As ``launch_gemv``, for one token; a program takes ``block_n`` rows, ``block_k`` inputs at a time."""
    operands, options = pack_gemm_operands(x, weight, bias, out, norm, **epilogue)
    shrink_programs = add_token_shrink(options, x.shape[1], num_warps, epilogue)
    gemv_k_loop_kernel[(shrink_programs + triton.cdiv(weight.shape[0], block_n),)](
        x, weight, *operands, block_n=block_n, block_k=block_k, num_warps=num_warps, **options
    )


def _get_max_registers(options: dict[str, Any], num_warps: int) -> int | None:
    """So many that as many programs run at a time as without adapters: a fourth, or a third, of 8 warps."""
    if num_warps != 8 or "low_rank" not in options:
        return None
    return 64 if "in_launch" in options else 80


@triton.jit(do_not_specialize=["num_tokens"])
def gemv_kernel(
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
    vectors: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    tiles_per_program: tl.constexpr,
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
    a_ptr=None,  # where programs of this launch shrink, as in ``shrink_in_product``; v_ptr is then what they write
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
    offs_k = tl.arange(0, vectors)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    mask_k = offs_k < inputs
    weights = weight_ptr + offs_k[None, :, :]
    # int64: a vocabulary's weight has more than 2^31 bytes
    first_row = get_weight_rows(first, features, block_n, gated).to(tl.int64)[:, None, None]
    # weights and gains never change: their loads start before the kernels before have ended
    w = tl.load(weights + first_row * inputs, mask=mask_k[None, :, :], other=0.0, eviction_policy="evict_first")
    if has_norm:
        g = tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if in_launch is not None:
        # The product is added to at its end, for all tiles at once: what waits does so once, when it is there.
        num_rows: tl.constexpr = tiles_per_program * block_n
        rows: tl.constexpr = triton.next_power_of_2(tiles_per_program) * block_n
        offs_rows = get_tile_rows(first * block_n, rows, features, gated)
        part_of_row, ranks, b_rows = find_adapter(offs_rows, slots_ptr, ranks_ptr, b_ptr, features, low_rank)
        ys = tl.zeros((rows // block_n, block_n), dtype=tl.float32)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    xs, scales = (), ()  # unrolled: each token is in registers of its own
    for token in tl.static_range(block_m):
        x_row = x_ptr + tl.minimum(token, num_tokens - 1) * inputs  # beyond the last: the last again, never stored
        x = tl.load(x_row + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if has_norm:
            scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1)) / inputs + eps)
            x = x * scale * g
            scales = scales + (scale,)  # type: ignore[assignment]  # noqa: RUF005
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    adds_at_once: tl.constexpr = low_rank is not None and in_launch is None
    if adds_at_once:
        offs_r = tl.arange(0, triton.next_power_of_2(low_rank[1]))
    for turn in range(tiles_per_program):
        tile = first + turn
        # the next tile's weights travel while this one's are multiplied
        next_row = get_weight_rows(tile + 1, features, block_n, gated).to(tl.int64)[:, None, None]
        next_mask = mask_k[None, :, :] & (turn + 1 < tiles_per_program)
        w_next = tl.load(weights + next_row * inputs, mask=next_mask, other=0.0, eviction_policy="evict_first")
        w_f32 = w.to(tl.float32)
        for token in tl.static_range(block_m):
            if adds_at_once:
                offs_n = get_weight_rows(tile, features, block_n, gated)
                v, b = load_low_rank(
                    offs_n, token, num_tokens, offs_r, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank
                )
            y = tl.sum(tl.sum(w_f32 * xs[token][None, :, :], axis=2), axis=1)
            if adds_at_once:
                term = tl.sum(v * b, axis=1)
                y += term * scales[token] if has_norm else term
            if in_launch is not None:
                ys = tl.where((tl.arange(0, ys.shape[0]) == turn)[:, None], y[None, :], ys)
            else:
                if has_bias:
                    y += tl.load(bias_ptr + get_weight_rows(tile, features, block_n, gated)).to(tl.float32)
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
def gemv_k_loop_kernel(
    x_ptr,  # (inputs,)
    weight_ptr,  # (features, inputs)
    bias_ptr,  # (features,)
    norm_ptr,  # (inputs,)
    residual_ptr,  # (features,), half of them where gated
    out_ptr,  # as residual
    eps,
    features: tl.constexpr,
    inputs: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
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
    a_ptr=None,  # as of ``gemv_kernel``
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
    offs_k = tl.arange(0, block_k // _VECTOR)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    weights = weight_ptr + offs_n.to(tl.int64)[:, None, None] * inputs + offs_k[None, :, :]
    w = tl.load(weights, mask=(offs_k < inputs)[None, :, :], other=0.0, eviction_policy="evict_first")
    if in_launch is not None:
        part_of_row, ranks, b_rows = find_adapter(offs_n, slots_ptr, ranks_ptr, b_ptr, features, low_rank)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    if low_rank is not None and in_launch is None:
        offs_r = tl.arange(0, triton.next_power_of_2(low_rank[1]))
        v, b = load_low_rank(offs_n, 0, 1, offs_r, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank)
    acc = tl.zeros((block_n, block_k // _VECTOR), dtype=tl.float32)
    squares = tl.zeros((block_k // _VECTOR,), dtype=tl.float32)
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
        acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=2)
        w = w_next
    y = tl.sum(acc, axis=1)
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
