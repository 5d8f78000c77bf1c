"""What the GEMM kernels share: which rows of the weight a program takes, and the epilogue behind the product.

Epilogue, in this order and in float32: the bias (by the kernels themselves), the gated activation ``silu(gate) * up``,
the residual; then one rounding to the output's dtype.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict, Unpack

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Epilogue", "get_weight_rows", "pack_epilogue", "pack_gemm_operands", "store_gemm_output"]


class Epilogue(TypedDict):
    """What comes after a product, and how its kernel is launched."""

    gated: NotRequired[bool]
    """The rows are gates and their up projections: store ``silu(gate) * up``."""
    residual: NotRequired[Tensor | None]
    """(num_tokens, features), half of them where gated: added last."""
    enable_pdl: bool
    """Programmatic dependent launch: start while the kernel before still runs; see ``pdl``."""


def pack_epilogue(
    stand_in: Tensor, bias: Tensor | None, **epilogue: Unpack[Epilogue]
) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """A kernel's arguments for its epilogue: bias and residual (``stand_in`` where there is none), and the options."""
    residual, enable_pdl = epilogue.get("residual"), epilogue["enable_pdl"]
    options = {
        "has_bias": bias is not None,
        "gated": epilogue.get("gated", False),
        "has_residual": residual is not None,
        "enable_pdl": enable_pdl,
        "launch_pdl": enable_pdl,
    }
    return stand_in if bias is None else bias, stand_in if residual is None else residual, options


def pack_gemm_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: tuple[Tensor, float] | None,
    **epilogue: Unpack[Epilogue],
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """What a kernel that norms its input itself takes behind ``x`` and its weights: bias, norm, residual and ``out``,
    or ``x`` for what there is not; and what it takes by name. ``weight`` (features, inputs)."""
    bias, residual, options = pack_epilogue(x, bias, **epilogue)
    norm_weight, eps = (x, 0.0) if norm is None else norm
    features, inputs = weight.shape
    shape = {"eps": eps, "has_norm": norm is not None, "features": features, "inputs": inputs}
    return (bias, norm_weight, residual, out), shape | options


@triton.jit
def get_weight_rows(tile, features: tl.constexpr, block_n: tl.constexpr, gated: tl.constexpr):
    """The weight's rows of a tile, within bounds. Gated, they are pairs of a gate and its up projection."""
    offs_n = tile * block_n + tl.arange(0, block_n)
    if gated:
        offs_n = offs_n // 2 + offs_n % 2 * (features // 2)
    return tl.minimum(offs_n, features - 1)


@triton.jit
def store_gemm_output(
    y,  # (block_n, block_m) float32; gated: gate and up in turns
    tile,
    offs_m,  # (block_m,)
    num_tokens,
    residual_ptr,  # (num_tokens, width): width is features, or half of them where gated
    out_ptr,
    features: tl.constexpr,
    block_n: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
):
    """Apply gate and residual to rows ``tile * block_n ...`` and store them, rounding once."""
    kept: tl.constexpr = block_n // 2 if gated else block_n
    width: tl.constexpr = features // 2 if gated else features
    if gated:
        pairs = tl.permute(tl.reshape(y, (kept, 2, y.shape[1])), (0, 2, 1))
        gate, up = tl.split(pairs)
        y = gate / (1.0 + tl.exp(-gate)) * up
    offs_n = tile * kept + tl.arange(0, kept)
    offs = offs_m.to(tl.int64)[None, :] * width + offs_n[:, None]
    mask = (offs_n < width)[:, None] & (offs_m < num_tokens)[None, :]
    if has_residual:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask)
