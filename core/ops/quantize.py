"""Activations in 8 bits, for layers that multiply them so."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation

__all__ = ["quantize_activation"]


def quantize_activation(x: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
    """``x`` (num_tokens, features) in ``output_format``: rounded to the nearest, ties to even, and saturated."""
    if output_format.kind == "native":
        return x
    most, dtype = (127.0, torch.int8) if output_format.kind == "int8_token" else (448.0, torch.float8_e4m3fn)
    rows, scale = x.reshape(-1, 128) if output_format.kind == "fp8_group" else x, output_format.scale
    if output_format.kind != "fp8_tensor" or scale is None:
        scale = (rows.abs().amax(-1, keepdim=True).float() / most).clamp(min=1e-12)
    values = (rows.float() / scale).clamp(-most, most)
    values = (values.round() if dtype == torch.int8 else values).to(dtype).view(x.shape)
    scale = scale if scale.dim() == 1 else scale.view(len(x), x.shape[1] // rows.shape[1])
    return QuantActivation(values, scale, dtype=x.dtype)
