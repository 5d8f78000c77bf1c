"""What the GEMM kernels share: which rows of the weight a program takes, and the epilogue behind the product.

Epilogue, in this order and in float32: what adapters add and the bias (by the kernels themselves), the gated activation
``silu(gate) * up``, the residual; then one rounding to the output's dtype.

Adapters (LoRA) add ``B v`` of a token's own B and v, which a kernel before made of its input: a program multiplies the
few ranks by its rows of B. A kernel without them is compiled without their arguments.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, Unpack

import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import LowRankTerm

__all__ = [
    "Epilogue",
    "add_low_rank",
    "find_part",
    "get_tile_rows",
    "get_weight_rows",
    "load_low_rank",
    "pack_epilogue",
    "pack_gemm_operands",
    "store_gemm_output",
    "store_token",
]


class Epilogue(TypedDict):
    """What comes after a product, and how its kernel is launched."""

    gated: NotRequired[bool]
    """The rows are gates and their up projections: store ``silu(gate) * up``."""
    residual: NotRequired[Tensor | None]
    """(num_tokens, features), half of them where gated: added last."""
    adapters: NotRequired[LowRankTerm | None]
    """Added to the product; of kernels that take it."""
    enable_pdl: bool
    """Programmatic dependent launch: start while the kernel before still runs; see ``pdl``."""


def pack_epilogue(
    stand_in: Tensor, bias: Tensor | None, **epilogue: Unpack[Epilogue]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A kernel's arguments for its epilogue: bias and residual (``stand_in`` where there is none), and the options."""
    residual, enable_pdl = epilogue.get("residual"), epilogue["enable_pdl"]
    options: dict[str, Any] = {
        "has_bias": bias is not None,
        "gated": epilogue.get("gated", False),
        "has_residual": residual is not None,
        "enable_pdl": enable_pdl,
        "launch_pdl": enable_pdl,
    }
    term = epilogue.get("adapters")
    if term is not None:
        options |= _pack_low_rank(term)
    return stand_in if bias is None else bias, stand_in if residual is None else residual, options


def pack_gemm_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: tuple[Tensor, float] | None,
    **epilogue: Unpack[Epilogue],
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
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
def find_part(offs_n, low_rank: tl.constexpr):
    """The part of the layer that each feature is of."""
    return (offs_n >= low_rank[3]).to(tl.int32) + (offs_n >= low_rank[3] + low_rank[4]).to(tl.int32)


@triton.jit
def load_low_rank(
    offs_n,  # (block_n,) features
    token,
    num_tokens,
    offs_r,  # (block_r,) ranks
    v_ptr,  # as in ``LowRankTerm``
    b_ptr,
    ranks_ptr,
    slots_ptr,
    features: tl.constexpr,
    low_rank: tl.constexpr,
):
    """Of the adapter of ``token``: v and the rows ``offs_n`` of B, each (block_n, block_r) float32, 0 without one. The
    sum over the ranks of their product is what it adds; the loads may be far ahead of that."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    splits: tl.constexpr = low_rank[2]
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    held = tl.maximum(slot, 0).to(tl.int64)
    part_of_row = find_part(offs_n, low_rank)
    rank = tl.load(ranks_ptr + held * parts + part_of_row, mask=(slot >= 0) & (part_of_row >= 0), other=0)
    mask = offs_r[None, :] < rank[:, None]
    b_at = b_ptr + (held * max_rank + offs_r)[None, :] * features + offs_n[:, None]
    b = tl.load(b_at, mask=mask, other=0.0).to(tl.float32)
    v_at = v_ptr + token * (parts * max_rank) + (part_of_row * max_rank)[:, None] + offs_r[None, :]
    v = tl.load(v_at, mask=mask, other=0.0)
    for split in tl.static_range(1, splits):
        v += tl.load(v_at + split * num_tokens * (parts * max_rank), mask=mask, other=0.0)
    return v, b


@triton.jit
def add_low_rank(
    y,  # (block_n, block_m) float32
    offs_n,  # (block_n,) features
    num_tokens,
    v_ptr,  # as in ``LowRankTerm``
    b_ptr,
    ranks_ptr,
    slots_ptr,
    features: tl.constexpr,
    low_rank: tl.constexpr,
):
    """``y`` and what adapters add to it, token by token: each has its own. Comes before the division by the root mean
    square of a norm that the product folds in."""
    offs_m = tl.arange(0, y.shape[1])
    for first_rank in range(0, low_rank[1], 16):  # as many as registers hold for all tokens
        offs_r = first_rank + tl.arange(0, 16)
        for token in tl.static_range(y.shape[1]):
            v, b = load_low_rank(
                offs_n, token, num_tokens, offs_r, v_ptr, b_ptr, ranks_ptr, slots_ptr, features, low_rank
            )
            y += tl.where((offs_m == token)[None, :], tl.sum(v * b, axis=1)[:, None], 0.0)
    return y


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


@triton.jit
def get_tile_rows(first, rows: tl.constexpr, features: tl.constexpr, gated: tl.constexpr):
    """As ``get_weight_rows``, of ``rows`` rows from the ``first`` on."""
    offs_n = first + tl.arange(0, rows)
    if gated:
        offs_n = offs_n // 2 + offs_n % 2 * (features // 2)
    return tl.minimum(offs_n, features - 1)


@triton.jit
def store_token(
    y,  # (rows,) float32; gated: gate and up in turns
    first,
    num_rows: tl.constexpr,
    residual_ptr,  # (width,)
    out_ptr,
    features: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
):
    """As ``store_gemm_output``, of the first ``num_rows`` of one token's rows from the ``first`` on."""
    kept: tl.constexpr = y.shape[0] // 2 if gated else y.shape[0]
    width: tl.constexpr = features // 2 if gated else features
    halves: tl.constexpr = 2 if gated else 1
    if gated:
        gate, up = tl.split(tl.reshape(y, (kept, 2)))
        y = gate / (1.0 + tl.exp(-gate)) * up
    offs = tl.arange(0, kept)
    offs_n = first // halves + offs
    mask = (offs < num_rows // halves) & (offs_n < width)
    if has_residual:
        y += tl.load(residual_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


def _pack_low_rank(term: LowRankTerm) -> dict[str, Any]:
    """What a kernel takes of adapters, by name."""
    parts, max_rank = len(term.part_sizes), term.b.shape[1]
    sizes = (*term.part_sizes, 0, 0)[:2]
    assert max_rank % 16 == 0, "as the tensor cores take them"
    return {
        "v_ptr": term.v,
        "b_ptr": term.b,
        "ranks_ptr": term.ranks,
        "slots_ptr": term.slots,
        "low_rank": (parts, max_rank, 0 if term.v is None else term.v.shape[0], *sizes),
    }
