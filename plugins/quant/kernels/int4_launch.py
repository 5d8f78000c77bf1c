"""What launches the kernels of int4 and int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.core.ops.kernels.linear_epilogue import Tail, tail_of
from quire.core.ops.kernels.pdl import supports_pdl
from quire.plugins.quant.kernels.int4_gemm_medium_m import combine_kernel, dequantize_kernel, wide_kernel
from quire.plugins.quant.kernels.int4_gemm_small_m import skinny_kernel
from quire.plugins.quant.kernels.int4_hopper import hopper_kernel

if TYPE_CHECKING:
    from quire.plugins.quant.kernels.int4 import IntWeights

__all__ = ["LAUNCHERS", "dequantized", "hopper", "skinny", "wide"]

_TOKENS, _CODES = NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(0, 32, 3)
"""How they lie in shared memory. Made once: that takes as long as the rest of a launch."""


def skinny(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    tokens: int,
    tiles: int,
    ways: int,
    depth: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """``out`` (num_tokens, features) from ``x`` (num_tokens, inputs), both dense; ``gated`` is SiLU.

    At most ``tokens`` (8 at least) of them. A program takes ``tiles`` times 16 rows (gated, half of them are gates);
    its ``ways`` warps share out the inputs, each taking ``depth`` blocks of them at a time. ``enable_pdl``: start while
    the kernel before still runs, where the device can.
    """
    bias, residual, options = tail_of(x, bias, **tail)
    skinny_kernel[(triton.cdiv(weights.words.shape[0], tiles),)](
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
        tokens=tokens,
        tiles=tiles,
        ways=ways,
        depth=depth,
        stages=num_stages,
        native=_native(x.dtype),
        num_warps=ways,
        **options,
    )


def wide(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    tokens: int,
    tiles: int,
    splits: int,
    scaled: int,
    num_warps: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """As ``skinny``, for any number of tokens, ``tokens`` of them to a program.

    The inputs are shared out to ``splits`` programs, and their results added up by another kernel.
    ``scaled``: scale the weights instead of the products, as groups smaller than a block always are.
    """
    num_tokens, features = x.shape[0], weights.features
    parts = out if splits == 1 else torch.empty(splits, num_tokens, features, dtype=torch.float32, device=x.device)
    bias, residual, options = tail_of(x, bias, **tail)
    wide_kernel[(triton.cdiv(weights.words.shape[0], tiles), triton.cdiv(num_tokens, tokens), splits)](
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
        tokens=tokens,
        tiles=tiles,
        splits=splits,
        scaled=bool(scaled) or weights.group_size * weights.bits < 512,
        stages=num_stages,
        native=_native(x.dtype),
        num_warps=num_warps,
        **options,
    )
    if splits > 1:
        _combine(parts, bias, residual, out, weights.features, splits, options)


def hopper(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    tokens: int,
    tiles: int,
    splits: int,
    consumers: int,
    num_warps: int,
    num_stages: int,
    **tail: Unpack[Tail],
) -> None:
    """As ``wide`` with scaled weights, on Hopper: 4 bits, float16 or bfloat16, and groups of a multiple of 128.

    A program's ``consumers``, one or two, have ``num_warps`` (4 or 8; 4 of two) and take ``tiles`` each.
    """
    num_tokens, features = x.shape[0], weights.features
    bias, residual, options = tail_of(x, bias, **tail)
    kinds = 2 if options["gated"] else 1
    held, blocks = weights.words.shape[:2]
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))
    parts = out if splits == 1 else torch.empty(splits, num_tokens, features, dtype=torch.float32, device=x.device)
    words = weights.words.view(kinds, held // kinds, blocks * 256)
    groups = weights.groups.view(kinds, held // kinds, -1)
    hopper_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(held, tiles * consumers), splits)](
        TensorDescriptor.from_tensor(x, [tokens, 128], _TOKENS),
        TensorDescriptor.from_tensor(words, [kinds, tiles // kinds, 256], _CODES),
        TensorDescriptor.from_tensor(groups, [kinds, tiles // kinds, 16], _CODES),
        bias,
        residual,
        parts,
        num_tokens,
        features=features,
        inputs=weights.inputs,
        group=weights.group_size,
        tokens=tokens,
        tiles=tiles,
        consumers=consumers,
        warps=num_warps,
        splits=splits,
        stages=num_stages,
        num_warps=num_warps,
        maxnreg=128 if consumers * num_warps == 4 and tiles * tokens <= 512 else None,  # for a second program
        **options,
    )
    if splits > 1:
        _combine(parts, bias, residual, out, features, splits, options)


def _combine(
    parts: Tensor, bias: Tensor, residual: Tensor, out: Tensor, features: int, splits: int, options: dict[str, bool]
) -> None:
    combine_kernel[(triton.cdiv(out.shape[1], 512), out.shape[0])](
        parts,
        bias,
        residual,
        out,
        out.shape[0],
        features=features,
        splits=splits,
        block=512,
        num_warps=4,
        **options,
    )


def dequantized(weights: IntWeights, dtype: torch.dtype, ways: int = 8) -> Tensor:
    """The weights (features, inputs) in ``dtype``."""
    out = torch.empty(weights.features, weights.inputs, dtype=dtype, device=weights.words.device)
    tiles, blocks = weights.words.shape[:2]
    enable_pdl = supports_pdl(out.device)
    dequantize_kernel[(tiles, triton.cdiv(blocks, ways))](
        weights.words,
        weights.groups,
        out,
        features=weights.features,
        inputs=weights.inputs,
        group=weights.group_size,
        bits=weights.bits,
        ways=ways,
        native=_native(dtype),
        enable_pdl=enable_pdl,
        num_warps=ways,
        launch_pdl=enable_pdl,
    )
    return out


LAUNCHERS: dict[str, Callable[..., None]] = {"skinny": skinny, "wide": wide, "hopper": hopper}


def _native(dtype: torch.dtype) -> bool:
    """Whether a GPU's own instructions unpack to ``dtype``."""
    return dtype in (torch.bfloat16, torch.float16) and not triton.knobs.runtime.interpret
