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
"""For steps that fill it: more programs hide the pause between two items."""
_DECODE_FLOAT32 = {
    64: DecodeTile(32, 4, 2, 4),
    128: DecodeTile(32, 8, 2, 2),
    256: DecodeTile(16, 4, 2, 2),
}


def decode_tile(spec: AttentionSpec, requests: int, queries: int, processors: int) -> DecodeTile:
    """The tile for a step of so many requests with ``queries`` each, on so many multiprocessors."""
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    if spec.dtype == torch.float32:
        return _DECODE_FLOAT32[dim]
    usual, many = _DECODE[dim], _DECODE_MANY.get(dim, _DECODE[dim])
    if queries * spec.num_heads // spec.num_kv_heads > 32:  # the rows of two warps spill
        return usual
    rounds = requests * spec.num_kv_heads / (processors * many.programs)
    # Between one round and three, fewer programs of longer turns end more evenly.
    return usual if rounds <= 0.5 or 1 < rounds < 2.75 else many


def processors_of(device: torch.device) -> int:
    """Multiprocessors of ``device``; a few where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
