"""Tile shapes measured on Hopper, by head dimension and type, with fallbacks for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from quire.core.contracts.attention import AttentionSpec

__all__ = ["DecodeTile", "decode_tile", "programs_on"]


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program of the decode kernel works, and how many run at a time on a multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


_DECODE = {
    64: DecodeTile(64, 4, 4, 4),
    128: DecodeTile(64, 4, 4, 2),
    256: DecodeTile(32, 4, 3, 2),
}
_DECODE_FLOAT32 = {
    64: DecodeTile(32, 4, 2, 4),
    128: DecodeTile(32, 8, 2, 2),
    256: DecodeTile(16, 8, 1, 2),
}


def decode_tile(spec: AttentionSpec) -> DecodeTile:
    """The tile for ``spec``."""
    table = _DECODE_FLOAT32 if spec.dtype == torch.float32 else _DECODE
    return table[triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))]


def programs_on(device: torch.device, tile: DecodeTile) -> int:
    """Programs that fill ``device``."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * tile.programs
