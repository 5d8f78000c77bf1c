"""RMS normalisation with the residual addition before it, and the quantization of its result behind it.

Algorithm: ``s = x + residual``, stored for the next addition; ``y = weight * s / sqrt(mean(s^2) + eps)``, the mean in
float32 and the scaled value rounded to the model's dtype before the weight multiplies it, as Llama's reference does;
``y`` is stored as it is or in 8 bits (``quantize_kernel``).

Shapes: ``x``, ``residual`` and the results (num_tokens, features). Grid: ``(num_tokens,)``.
Registers: a whole row, read and written once. Shared memory: the reductions alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait, supports_pdl
from quire.core.ops.kernels.quantize_kernel import (
    ACTIVATION_FORMAT_CODES,
    NATIVE_FORMAT,
    allocate_activation,
    get_row_warps,
    quantize_and_store_row,
)

__all__ = ["launch_rms_norm"]


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat = NATIVE_FORMAT
) -> tuple[Any, Tensor]:
    """As ``quire.core.ops.norm.rms_norm_quantized``. ``x`` and ``residual`` (num_tokens, features), rows dense."""
    rows, features = x.shape
    out, values, scale = allocate_activation(x, features, output_format)
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
        kind=ACTIVATION_FORMAT_CODES[output_format.kind],
        block=block,
        enable_pdl=enable_pdl,
        num_warps=get_row_warps(block),
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
    offs = tl.arange(0, block)
    mask = offs < features
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    if has_residual:
        x = x + tl.load(residual_ptr + row * features + offs, mask=mask, other=0.0)
        tl.store(summed_ptr + row * features + offs, x, mask=mask)
    x_f32 = x.to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(x_f32 * x_f32) / features + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    quantize_and_store_row(weight * (x_f32 * inv_rms).to(x.dtype), row, offs, out_ptr, scale_ptr, features, kind)
