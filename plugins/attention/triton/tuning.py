"""Tile shapes measured on Hopper, by head dimension and type, with fallbacks for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from quire.core.contracts.attention import AttentionSpec

__all__ = ["DecodeTile", "decode_tile", "processors_of"]


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
_DECODE_MANY = {128: DecodeTile(32, 2, 4, 4)}
"""Where each program has several items: more programs hide the pause between two."""
_DECODE_FLOAT32 = {
    64: DecodeTile(32, 4, 2, 4),
    128: DecodeTile(32, 8, 2, 2),
    256: DecodeTile(16, 8, 1, 2),
}


def decode_tile(spec: AttentionSpec, many: bool, queries: int = 1) -> DecodeTile:
    """The tile for ``spec``; ``many``: more pairs of a request and a KV head than the usual tile has programs."""
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    if spec.dtype == torch.float32:
        return _DECODE_FLOAT32[dim]
    crowded = queries * spec.num_heads // spec.num_kv_heads > 32  # the rows of two warps spill
    return _DECODE_MANY.get(dim, _DECODE[dim]) if many and not crowded else _DECODE[dim]


def processors_of(device: torch.device) -> int:
    """Multiprocessors of ``device``; a few where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
