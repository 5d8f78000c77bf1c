"""The gated activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.core.ops.kernels.dependent import can_chain, start_next, wait_for_previous

__all__ = ["silu_and_mul"]

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As ``quire.core.ops.silu_and_mul``. ``gate_up`` (num_tokens, 2 * features), dense."""
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2)
    grid = (rows, triton.cdiv(width // 2, _BLOCK))
    chained = can_chain(out.device)
    _silu_and_mul_kernel[grid](
        gate_up, out, features=width // 2, block=_BLOCK, chained=chained, num_warps=4, launch_pdl=chained
    )
    return out


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, features: tl.constexpr, block: tl.constexpr, chained: tl.constexpr):
    start_next(chained)
    wait_for_previous(chained)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < features
    gate = tl.load(gate_up_ptr + row * 2 * features + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * features + features + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * features + at, silu * up, mask=inside)
