"""RMS normalisation with the residual addition, one program a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait, supports_pdl
from quire.core.ops.kernels.quantize_kernel import (
    FORMAT_CODES,
    NATIVE_FORMAT,
    allocate_output,
    get_num_warps,
    quantize_and_store_row,
)

__all__ = ["launch_rms_norm"]


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat = NATIVE_FORMAT
) -> tuple[Any, Tensor]:
    """As ``quire.core.ops.norm.rms_norm_quantized``. ``x`` and ``residual`` (num_tokens, features), rows dense."""
    rows, features = x.shape
    out, values, scale = allocate_output(x, features, output_format)
    summed = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(features)
    enable_pdl = supports_pdl(x.device)
    _rms_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        values,
        scale,
        summed,
        x.stride(0),
        eps,
        features=features,
        has_residual=residual is not None,
        kind=FORMAT_CODES[output_format.kind],
        block=block,
        enable_pdl=enable_pdl,
        num_warps=get_num_warps(block),
        launch_pdl=enable_pdl,
    )
    return out, summed


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    summed_ptr,
    x_stride,
    eps,
    features: tl.constexpr,
    has_residual: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < features
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    if has_residual:
        x = x + tl.load(residual_ptr + row * features + at, mask=inside, other=0.0)
        tl.store(summed_ptr + row * features + at, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / features + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    quantize_and_store_row(weight * (wide * inverse).to(x.dtype), row, at, out_ptr, scale_ptr, features, kind)
