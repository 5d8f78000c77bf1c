"""What launches the kernels of int4 and int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.plugins.quant.kernels.int4_gemm_hopper import int4_gemm_hopper_kernel
from quire.plugins.quant.kernels.int4_gemm_medium_m import (
    combine_split_k_kernel,
    int4_dequantize_kernel,
    int4_gemm_medium_m_kernel,
)
from quire.plugins.quant.kernels.int4_gemm_small_m import int4_gemm_small_m_kernel
from quire.plugins.quant.kernels.int4_weights import IntWeights
from quire.sdk.ops import Epilogue, add_shrink, pack_epilogue, supports_pdl

__all__ = [
    "LAUNCHERS",
    "PARTIAL_LAUNCHERS",
    "launch_dequantize_int4",
    "launch_int4_gemm_hopper",
    "launch_int4_gemm_medium_m",
    "launch_int4_gemm_small_m",
]

_TOKENS, _CODES = NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(0, 32, 3)
"""How they lie in shared memory. Made once: that takes as long as the rest of a launch."""


def launch_int4_gemm_small_m(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    block_m: int,
    tiles: int,
    slice_k: int,
    unroll_k: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs), both dense, float16 or bfloat16.

    At most ``block_m`` (8 at least) tokens. A program takes ``tiles`` times 16 rows (gated, half of them are gates);
    its ``slice_k`` warps share out the inputs, each taking ``unroll_k`` blocks of them at a time.
    """
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    shrink_programs = add_shrink(options, weights.inputs, block_m, epilogue)
    int4_gemm_small_m_kernel[(shrink_programs + triton.cdiv(weights.words.shape[0], tiles),)](
        x,
        weights.words,
        weights.groups,
        bias,
        residual,
        out,
        x.shape[0],
        features=weights.features,
        inputs=weights.inputs,
        group=weights.group_size,
        bits=weights.bits,
        block_m=block_m,
        tiles=tiles,
        slice_k=slice_k,
        unroll_k=unroll_k,
        stages=num_stages,
        native=_has_native_unpack(x.dtype),
        num_warps=slice_k,
        **options,
    )


def launch_int4_gemm_medium_m(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor | None,
    *,
    block_m: int,
    tiles: int,
    split_k: int,
    scale_weights: int,
    num_warps: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> Tensor:
    """As ``launch_int4_gemm_small_m``, for any number of tokens, ``block_m`` of them to a program. Returns ``out``, or
    where that is None the partial sums, as ``LinearMethod.apply_partial``.

    The inputs are shared out to ``split_k`` programs, and their results added up by another kernel.
    ``scale_weights``: scale the weights instead of the products, as groups smaller than a block always are.
    """
    num_tokens, features = x.shape[0], weights.features
    parts = _allocate_parts(x, features, split_k, out)
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    int4_gemm_medium_m_kernel[(triton.cdiv(weights.words.shape[0], tiles), triton.cdiv(num_tokens, block_m), split_k)](
        x,
        weights.words,
        weights.groups,
        bias,
        residual,
        parts,
        num_tokens,
        features=features,
        inputs=weights.inputs,
        group=weights.group_size,
        bits=weights.bits,
        block_m=block_m,
        tiles=tiles,
        split_k=split_k,
        scale_weights=bool(scale_weights) or weights.group_size * weights.bits < 512,
        stages=num_stages,
        native=_has_native_unpack(x.dtype),
        leads=out is None,
        num_warps=num_warps,
        **options,
    )
    if out is None or split_k == 1:
        return parts
    return _launch_combine_split_k(parts, bias, residual, out, options)


def launch_int4_gemm_hopper(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor | None,
    *,
    block_m: int,
    tiles: int,
    split_k: int,
    num_consumers: int,
    num_warps: int,
    num_stages: int,
    **epilogue: Unpack[Epilogue],
) -> Tensor:
    """As ``launch_int4_gemm_medium_m`` with scaled weights, on Hopper: 4 bits and groups of a multiple of 128.

    A program's ``num_consumers``, one or two, have ``num_warps`` (4 or 8; 4 of two) and take ``tiles`` each.
    """
    num_tokens, features = x.shape[0], weights.features
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    kinds = 2 if options["gated"] else 1
    held, blocks = weights.words.shape[:2]
    split_k = triton.cdiv(blocks, triton.cdiv(blocks, split_k))
    parts = _allocate_parts(x, features, split_k, out)
    words = weights.words.view(kinds, held // kinds, blocks * 256)
    groups = weights.groups.view(kinds, held // kinds, -1)
    int4_gemm_hopper_kernel[(triton.cdiv(num_tokens, block_m), triton.cdiv(held, tiles * num_consumers), split_k)](
        TensorDescriptor.from_tensor(x, [block_m, 128], _TOKENS),
        TensorDescriptor.from_tensor(words, [kinds, tiles // kinds, 256], _CODES),
        TensorDescriptor.from_tensor(groups, [kinds, tiles // kinds, 16], _CODES),
        bias,
        residual,
        parts,
        num_tokens,
        features=features,
        inputs=weights.inputs,
        group=weights.group_size,
        block_m=block_m,
        tiles=tiles,
        num_consumers=num_consumers,
        warps=num_warps,
        split_k=split_k,
        stages=num_stages,
        leads=out is None,
        num_warps=num_warps,
        maxnreg=128 if num_consumers * num_warps == 4 and tiles * block_m <= 512 else None,  # for a second program
        **options,
    )
    if out is None or split_k == 1:
        return parts
    return _launch_combine_split_k(parts, bias, residual, out, options)


def _allocate_parts(x: Tensor, features: int, split_k: int, out: Tensor | None) -> Tensor:
    """What the product's programs write: ``out`` itself, or partial sums (split_k, num_tokens, features)."""
    if out is not None and split_k == 1:
        return out
    return x.new_empty(split_k, x.shape[0], features, dtype=x.dtype if split_k == 1 else torch.float32)


def _launch_combine_split_k(
    parts: Tensor, bias: Tensor, residual: Tensor, out: Tensor, options: dict[str, bool]
) -> Tensor:
    combine_split_k_kernel[(triton.cdiv(out.shape[1], 512), out.shape[0])](
        parts,
        bias,
        residual,
        out,
        out.shape[0],
        features=parts.shape[2],
        split_k=parts.shape[0],
        block_n=512,
        num_warps=4,
        **options,
    )
    return out


def launch_dequantize_int4(weights: IntWeights, dtype: torch.dtype, blocks_per_program: int = 8) -> Tensor:
    """The weights (features, inputs) in ``dtype``."""
    out = torch.empty(weights.features, weights.inputs, dtype=dtype, device=weights.words.device)
    tiles, blocks = weights.words.shape[:2]
    enable_pdl = supports_pdl(out.device)
    int4_dequantize_kernel[(tiles, triton.cdiv(blocks, blocks_per_program))](
        weights.words,
        weights.groups,
        out,
        features=weights.features,
        inputs=weights.inputs,
        group=weights.group_size,
        bits=weights.bits,
        blocks_per_program=blocks_per_program,
        native=_has_native_unpack(dtype),
        enable_pdl=enable_pdl,
        num_warps=blocks_per_program,
        launch_pdl=enable_pdl,
    )
    return out


PARTIAL_LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "gemm_medium_m": launch_int4_gemm_medium_m,
    "gemm_hopper": launch_int4_gemm_hopper,
}
LAUNCHERS: dict[str, Callable[..., Any]] = {"gemm_small_m": launch_int4_gemm_small_m, **PARTIAL_LAUNCHERS}


def _has_native_unpack(dtype: torch.dtype) -> bool:
    """Whether a GPU's own instructions unpack to ``dtype``."""
    return dtype in (torch.bfloat16, torch.float16) and not triton.knobs.runtime.interpret
