"""Activations in 8 bits, for layers that multiply them so."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation

__all__ = ["quantize_activation"]


def quantize_activation(x: Tensor, wanted: ActivationFormat) -> Tensor | QuantActivation:
    """``x`` (num_tokens, features) in the format ``wanted``: rounded to the nearest, ties to even, and saturated."""
    if wanted.kind == "native":
        return x
    most, dtype = (127.0, torch.int8) if wanted.kind == "int8_token" else (448.0, torch.float8_e4m3fn)
    scale = wanted.scale
    if wanted.kind == "fp8_group":
        groups = quantize_activation(x.reshape(-1, 128), ActivationFormat("fp8_token"))
        assert isinstance(groups, QuantActivation)
        return QuantActivation(groups.values.view_as(x), groups.scale.view(len(x), -1), dtype=x.dtype)
    if wanted.kind != "fp8_tensor" or scale is None:
        scale = (x.abs().amax(-1, keepdim=True).float() / most).clamp(min=1e-12)
    values = (x.float() / scale).clamp(-most, most)
    return QuantActivation((values.round() if dtype == torch.int8 else values).to(dtype), scale, dtype=x.dtype)
