"""Activations in 8 bits: on their own, and as what the norm and the gated activation do at their end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.kernels.dependent import can_chain, start_next, wait_for_previous

__all__ = ["KINDS", "empty_output", "quantize_activation", "row_warps", "store_row"]

KINDS = {"native": 0, "fp8_tensor": 1, "fp8_token": 2, "int8_token": 3}
"""As ``store_row`` counts them."""


def quantize_activation(x: Tensor, wanted: ActivationFormat) -> QuantActivation:
    """As ``quire.core.ops.quantize_activation``. ``x`` (num_tokens, features), rows dense."""
    rows, features = x.shape
    out, values, scale = empty_output(x, features, wanted)
    block = triton.next_power_of_2(features)
    chained = can_chain(x.device)
    _quantize_kernel[(rows,)](
        x,
        values,
        scale,
        x.stride(0),
        features=features,
        kind=KINDS[wanted.kind],
        block=block,
        chained=chained,
        num_warps=row_warps(block),
        launch_pdl=chained,
    )
    assert isinstance(out, QuantActivation)
    return out


def empty_output(x: Tensor, features: int, wanted: ActivationFormat) -> tuple[Tensor | QuantActivation, Tensor, Tensor]:
    """(what to return, its values, its scale) for as many rows as ``x`` has; the scale of a native one is not read."""
    if wanted.kind == "native":
        values = x.new_empty(x.shape[0], features)
        return values, values, values
    dtype = torch.int8 if wanted.kind == "int8_token" else torch.float8_e4m3fn
    values = torch.empty(x.shape[0], features, dtype=dtype, device=x.device)
    scale = wanted.scale
    if wanted.kind != "fp8_tensor" or scale is None:
        scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return QuantActivation(values, scale, dtype=x.dtype), values, scale


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of ``block`` numbers."""
    return min(32 if block > 16384 else 16, max(1, block // 256))


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, features: tl.constexpr, kind: tl.constexpr, block: tl.constexpr,
    chained: tl.constexpr,
):  # fmt: skip
    start_next(chained)
    wait_for_previous(chained)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < features, other=0.0)
    store_row(x, row, at, out_ptr, scale_ptr, features, kind)


@triton.jit
def store_row(y, row, at, out_ptr, scale_ptr, features: tl.constexpr, kind: tl.constexpr):
    """Store a whole row, zero where ``at`` is outside, as the format of ``kind`` wants it."""
    if kind:
        y = y.to(tl.float32)
        if kind == 1:
            scale = tl.load(scale_ptr)
        else:
            scale = tl.maximum(tl.max(tl.abs(y)) / (127.0 if kind == 3 else 448.0), 1e-12)
            tl.store(scale_ptr + row, scale)
        y = y / scale
        if kind == 3:
            y = (y + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
        else:
            y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    tl.store(out_ptr + row * features + at, y.to(out_ptr.dtype.element_ty), mask=at < features)
