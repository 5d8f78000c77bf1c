"""Activations in 8 bits by a separate kernel, where no norm or gated activation before the layer emits them.

Algorithm, shapes and formats: ``quire.core.ops.kernels.quantize_kernel``. Grid: ``(num_tokens,)``, a program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.sdk import ActivationFormat, QuantActivation
from quire.sdk.ops import (
    ACTIVATION_FORMAT_CODES,
    allocate_activation,
    get_row_warps,
    pdl_launch_dependents,
    pdl_wait,
    quantize_and_store_row,
    supports_pdl,
)
from quire.sdk.ops import quantize_activation as twin

__all__ = ["dequantize_activation", "quantize_activation"]


def quantize_activation(x: Tensor, output_format: ActivationFormat) -> QuantActivation:
    """As ``quire.sdk.ops.quantize_activation``, which is its twin. ``x`` (num_tokens, features), rows dense."""
    if not x.is_cuda:
        out = twin(x, output_format)
        assert isinstance(out, QuantActivation)
        return out
    return launch_quantize_activation(x, output_format)


def launch_quantize_activation(x: Tensor, output_format: ActivationFormat) -> QuantActivation:
    """The kernel: a program a row."""
    rows, features = x.shape
    out, values, scale = allocate_activation(x, features, output_format)
    block = triton.next_power_of_2(features)
    enable_pdl = supports_pdl(x.device)
    _quantize_kernel[(rows,)](
        x,
        values,
        scale,
        x.stride(0),
        features=features,
        kind=ACTIVATION_FORMAT_CODES[output_format.kind],
        block=block,
        enable_pdl=enable_pdl,
        num_warps=get_row_warps(block),
        launch_pdl=enable_pdl,
    )
    assert isinstance(out, QuantActivation)
    return out


def dequantize_activation(x: QuantActivation, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that ``x`` stands for, (num_tokens, features) in ``dtype``, by default that before it was
    quantized."""
    scale = x.scale.repeat_interleave(128, 1) if x.scale.dim() == 2 and x.scale.shape[1] > 1 else x.scale
    wide = torch.promote_types(dtype or x.dtype, torch.float32)
    return (x.values.to(wide) * scale).to(dtype or x.dtype)


@triton.jit
def _quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    features: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, block)
    x = tl.load(x_ptr + row * x_stride + offs, mask=offs < features, other=0.0)
    quantize_and_store_row(x, row, offs, out_ptr, scale_ptr, features, kind)
