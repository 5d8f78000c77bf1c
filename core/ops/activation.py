"""The gated activation between the two halves of an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.quantize import quantize_activation

__all__ = ["silu_and_mul", "silu_and_mul_in_torch", "silu_and_mul_quantized"]


def silu_and_mul_quantized(gate_up: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
    """``silu_and_mul`` with its result in ``output_format``."""
    if gate_up.is_cuda:
        from quire.core.ops.kernels import activation_kernel as activation

        return activation.launch_silu_and_mul(gate_up, output_format)
    return silu_and_mul_in_torch(gate_up, output_format)


def silu_and_mul_in_torch(gate_up: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
    """``silu_and_mul_quantized`` on any device."""
    gate, up = gate_up.chunk(2, dim=-1)
    return quantize_activation(F.silu(gate) * up, output_format)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``: (num_tokens, 2 * features), gate first -> (num_tokens, features)."""
    return silu_and_mul_quantized(gate_up, ActivationFormat())  # type: ignore[return-value]
