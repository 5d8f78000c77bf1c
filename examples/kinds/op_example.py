"""The activation of another author: ``--op silu_and_mul=op_example:Swish``."""

import torch

from quire.sdk import Operations
from quire.sdk.ops import quantize_activation


class Swish(Operations):
    """``silu(gate) * up``, with the sigmoid in float32."""

    @classmethod
    def unsupported(cls, device):
        return []

    def silu_and_mul(self, gate_up, output_format):
        gate, up = gate_up.chunk(2, dim=-1)
        y = gate.float() * torch.sigmoid(gate.float()) * up.float()
        return quantize_activation(y.to(gate_up.dtype), output_format)
