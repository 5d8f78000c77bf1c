"""RMS normalisation, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.quantize import quantize_activation

__all__ = ["rms_norm", "rms_norm_in_torch", "rms_norm_quantized"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``y = weight * s / sqrt(mean(s^2) + eps)`` with ``s = x + residual``; returns ``(y, s)``, both in ``x``'s dtype.

    ``x`` (..., features), ``weight`` (features,). The mean is taken in float32 and the scaled value is rounded to the
    model's dtype before the weight multiplies it, as Llama's reference does (Zhang and Sennrich, 2019,
    arXiv:1910.07467).
    """
    return rms_norm_quantized(x, weight, eps, residual, ActivationFormat())  # type: ignore[return-value]


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat
) -> tuple[Tensor | QuantActivation, Tensor]:
    """``rms_norm`` with ``y`` in ``output_format``: rounded to the model's dtype, then quantized."""
    if x.is_cuda and x.dim() == 2:
        from quire.core.ops.kernels import norm_kernel as norm

        return norm.launch_rms_norm(x, weight, eps, residual, output_format)
    return rms_norm_in_torch(x, weight, eps, residual, output_format)


def rms_norm_in_torch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat
) -> tuple[Tensor | QuantActivation, Tensor]:
    """``rms_norm_quantized`` on any device."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return quantize_activation(weight * scaled.to(x.dtype), output_format), summed
