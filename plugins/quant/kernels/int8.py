"""INT8 layers (W8A8): weights and, from some tokens on, activations of 8 bits, without zero points."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.fp8_layer import EightBitGemm, get_gemm_plan
from quire.sdk import ActivationFormat, InputFormat, LowRankShrink, QuantActivation
from quire.sdk.ops import pdl_launch_dependents, pdl_wait, supports_pdl

__all__ = ["apply_linear", "can_implement", "get_input_format", "quantize_activation", "quantize_weight"]

_INT8_MAX = 127.0
_PER_TOKEN = ActivationFormat("int8_token")
_MIN_ROWS = 17
"""Fewest rows that ``torch._int_mm`` takes."""
_BLOCK = 1024


def can_implement(weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, weight_only: bool = False) -> bool:
    """Whether ``apply_linear`` takes these on their device: a GPU, with rows and inputs in whole vectors of 16 and 32,
    and one scale for each row."""
    features, inputs = weight.shape
    if weight.device.type != "cuda":
        return False
    if weight_scale.dim() != 1 or features % 16 or inputs % 32:
        return False
    get_gemm_plan(weight.device, features, inputs, weight.dtype)
    return True


def get_input_format(weight_scale: Tensor, input_scale: Tensor | None, weight_only: bool = False) -> InputFormat:
    """What the operation before such a layer should emit, where it is not part of the layer's own kernel."""
    return "native" if weight_only else "int8_token"


def apply_linear(
    x: Tensor | QuantActivation,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    weight_only: bool = False,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    adapters: LowRankShrink | None = None,
) -> Tensor | None:
    """As ``kernels.fp8.linear``, for ``weight`` (features, inputs) int8 and ``weight_scale`` (features,) float32.

    Each token has a scale of its own; ``input_scale``, one for all, is not used.
    """
    return EightBitGemm(_PER_TOKEN, multiply_by_library).apply_linear(
        x,
        weight,
        weight_scale,
        bias,
        None,
        weight_only=weight_only,
        norm=norm,
        activation=activation,
        residual=residual,
        adapters=adapters,
    )


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (features, inputs) in int8 and its scale (features,) float32: each row's largest becomes 127."""
    scale = (weight.abs().amax(dim=1).float() / _INT8_MAX).clamp(min=1e-12)
    return (weight.float() / scale[:, None]).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale


def quantize_activation(x: Tensor, scale: Tensor | None = None) -> QuantActivation:
    """``x`` (num_tokens, features) in int8, with a scale for each token."""
    assert scale is None, "activations in int8 have a scale for each token"
    return fp8_quantize.quantize_activation(x, _PER_TOKEN)


def multiply_by_library(x: QuantActivation, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The library's product in int32, then the scales."""
    values, rows = x.values, x.values.shape[0]
    if rows < _MIN_ROWS:
        values = torch.cat([values, values.new_zeros(_MIN_ROWS - rows, values.shape[1])])
    return launch_rescale(torch._int_mm(values, weight.t())[:rows], x.scale, scale, bias, x.dtype)


def launch_rescale(sums: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``sums`` (num_tokens, features) int32 times ``x_scale`` (num_tokens, 1) and ``scale`` (features,), and bias."""
    rows, features = sums.shape
    out = torch.empty(rows, features, dtype=dtype, device=sums.device)
    enable_pdl = supports_pdl(sums.device)
    _rescale_kernel[(rows, triton.cdiv(features, _BLOCK))](
        sums,
        x_scale,
        scale,
        scale if bias is None else bias,
        out,
        features=features,
        block=_BLOCK,
        has_bias=bias is not None,
        enable_pdl=enable_pdl,
        num_warps=4,
        launch_pdl=enable_pdl,
    )
    return out


@triton.jit
def _rescale_kernel(
    sums_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    features: tl.constexpr,
    block: tl.constexpr,
    has_bias: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * block + tl.arange(0, block)
    mask = offs < features
    y = tl.load(sums_ptr + row * features + offs, mask=mask, other=0).to(tl.float32) * tl.load(x_scale_ptr + row)
    y *= tl.load(scale_ptr + offs, mask=mask, other=0.0)
    if has_bias:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * features + offs, y.to(out_ptr.dtype.element_ty), mask=mask)
