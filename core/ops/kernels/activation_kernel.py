"""The gated activation ``silu(gate) * up`` of an MLP, and the quantization of its result.

Algorithm: elementwise, SiLU in float32 and rounded to the model's dtype before the product, as the models' references
do. In 8 bits a row's scale needs the whole row (``quantize_kernel``).

Shapes: ``gate_up`` (num_tokens, 2 * features), gate first; the result (num_tokens, features).
Grid: ``(num_tokens, features / block)``; one program a row where the result is quantized.
Registers: a block of gates and one of up projections. Shared memory: the reductions alone.
"""

from __future__ import annotations

from typing import Any

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

__all__ = ["launch_silu_and_mul"]

_BLOCK = 1024


def launch_silu_and_mul(gate_up: Tensor, output_format: ActivationFormat = NATIVE_FORMAT) -> Any:
    """As ``quire.core.ops.silu_and_mul_quantized``. ``gate_up`` (num_tokens, 2 * features), dense."""
    rows, width = gate_up.shape
    out, values, scale = allocate_activation(gate_up, width // 2, output_format)
    kind = ACTIVATION_FORMAT_CODES[output_format.kind]
    block = triton.next_power_of_2(width // 2) if kind else _BLOCK  # a quantized row is one program's
    grid = (rows, triton.cdiv(width // 2, block))
    enable_pdl = supports_pdl(gate_up.device)
    _silu_and_mul_kernel[grid](
        gate_up,
        values,
        scale,
        features=width // 2,
        kind=kind,
        block=block,
        enable_pdl=enable_pdl,
        num_warps=get_row_warps(block),
        launch_pdl=enable_pdl,
    )
    return out


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    features: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * block + tl.arange(0, block)
    mask = offs < features
    gate = tl.load(gate_up_ptr + row * 2 * features + offs, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * features + features + offs, mask=mask, other=0.0)
    gate_f32 = gate.to(tl.float32)
    silu = (gate_f32 / (1.0 + tl.exp(-gate_f32))).to(gate.dtype)
    quantize_and_store_row(silu * up, row, offs, out_ptr, scale_ptr, features, kind)
