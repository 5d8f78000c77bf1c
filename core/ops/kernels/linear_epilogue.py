"""What the kernels of linear layers share: which rows a program takes, and what comes after the product."""

from __future__ import annotations

from typing import NotRequired, TypedDict, Unpack

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tail", "finish", "operands_of", "rows_of", "tail_of"]


class Tail(TypedDict):
    """What comes after a product, and how its kernel is launched."""

    gated: NotRequired[bool]
    """The rows are gates and their up projections: store ``silu(gate) * up``."""
    residual: NotRequired[Tensor | None]
    """(num_tokens, features), half of them where gated: added last."""
    enable_pdl: bool
    """Programmatic dependent launch: start while the kernel before still runs; see ``pdl``."""


def tail_of(stand_in: Tensor, bias: Tensor | None, **tail: Unpack[Tail]) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """A kernel's arguments for its tail: bias and residual, or ``stand_in`` for what there is not, and the options."""
    residual, enable_pdl = tail.get("residual"), tail["enable_pdl"]
    options = {
        "has_bias": bias is not None,
        "gated": tail.get("gated", False),
        "has_residual": residual is not None,
        "enable_pdl": enable_pdl,
        "launch_pdl": enable_pdl,
    }
    return stand_in if bias is None else bias, stand_in if residual is None else residual, options


def operands_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, norm: tuple[Tensor, float] | None, **tail: Unpack[Tail]
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """What a kernel that norms its input itself takes behind ``x`` and its weights: bias, norm, residual and ``out``,
    or ``x`` for what there is not; and what it takes by name. ``weight`` (features, inputs)."""
    bias, residual, options = tail_of(x, bias, **tail)
    gain, eps = (x, 0.0) if norm is None else norm
    features, inputs = weight.shape
    shape = {"eps": eps, "has_norm": norm is not None, "features": features, "inputs": inputs}
    return (bias, gain, residual, out), shape | options


@triton.jit
def rows_of(tile, features: tl.constexpr, rows: tl.constexpr, gated: tl.constexpr):
    """The weight's rows of a tile, within bounds. Gated, they are pairs of a gate and its up projection."""
    row = tile * rows + tl.arange(0, rows)
    if gated:
        row = row // 2 + row % 2 * (features // 2)
    return tl.minimum(row, features - 1)


@triton.jit
def finish(
    y,  # (rows, tokens) float32; gated: gate and up in turns
    tile,
    token,  # (tokens,)
    num_tokens,
    residual_ptr,  # (num_tokens, width): width is features, or half of them where gated
    out_ptr,
    features: tl.constexpr,
    rows: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
):
    """Finish and store rows ``tile * rows ...``, rounding once."""
    kept: tl.constexpr = rows // 2 if gated else rows
    width: tl.constexpr = features // 2 if gated else features
    if gated:
        pairs = tl.permute(tl.reshape(y, (kept, 2, y.shape[1])), (0, 2, 1))
        gate, up = tl.split(pairs)
        y = gate / (1.0 + tl.exp(-gate)) * up
    row = tile * kept + tl.arange(0, kept)
    at = token.to(tl.int64)[None, :] * width + row[:, None]
    inside = (row < width)[:, None] & (token < num_tokens)[None, :]
    if has_residual:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
