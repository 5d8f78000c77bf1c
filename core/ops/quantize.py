"""Activations in 8 bits, for layers that multiply them so."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation

__all__ = ["dequantize_activation", "quantize_activation"]

_LEAST = 1e-12
"""A scale is never less, so that a row of zeros has one."""


def quantize_activation(x: Tensor, wanted: ActivationFormat) -> Tensor | QuantActivation:
    """``x`` (num_tokens, features) in the format ``wanted``: rounded to the nearest, ties to even, and saturated."""
    if wanted.kind == "native":
        return x
    if x.is_cuda:
        from quire.core.ops.kernels import quantize

        return quantize.quantize_activation(x, wanted)
    whole = wanted.kind == "int8_token"
    most, dtype = (127.0, torch.int8) if whole else (448.0, torch.float8_e4m3fn)
    scale = wanted.scale if wanted.kind == "fp8_tensor" else None
    if scale is None:
        scale = (x.abs().amax(-1, keepdim=True).float() / most).clamp(min=_LEAST)
    values = (x.float() / scale).clamp(-most, most)
    return QuantActivation((values.round() if whole else values).to(dtype), scale, dtype=x.dtype)


def dequantize_activation(x: QuantActivation) -> Tensor:
    """The numbers that ``x`` stands for, (num_tokens, features) in its unquantized dtype."""
    return (x.values.float() * x.scale).to(x.dtype)
