"""Tile shapes measured on Hopper, by head dimension and type, with fallbacks for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from quire.sdk import AttentionSpec

__all__ = ["DecodeTile", "decode_tile", "processors_of"]


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program of the decode kernel works, and how many run at a time on a multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


_FEW = {
    64: DecodeTile(64, 4, 3, 4),
    128: DecodeTile(64, 4, 3, 4),
    256: DecodeTile(32, 4, 3, 2),
}
_MANY = {
    (64, 1): DecodeTile(32, 1, 3, 8),
    (128, 1): DecodeTile(32, 1, 3, 8),
    (256, 1): DecodeTile(32, 1, 3, 3),
    (64, 2): DecodeTile(32, 1, 3, 8),
    (128, 2): DecodeTile(32, 1, 3, 6),
    (256, 2): DecodeTile(32, 2, 3, 3),
}
"""(dim, bytes of a key's feature): for steps that fill the GPU. Nothing passes between the warps of a program that has
one."""
_ONE_ROUND = {(128, 2): DecodeTile(32, 1, 2, 8)}
"""Where that many programs take all of such a step at once."""
_MANY_TO_VERIFY = DecodeTile(32, 2, 3, 6)
"""Up to 32 queries and heads of a group at a time, up to 128 features."""
_WIDE = DecodeTile(32, 4, 3, 2)
"""More of them."""
_FLOAT32 = {
    64: DecodeTile(32, 4, 2, 4),
    128: DecodeTile(32, 8, 2, 2),
    256: DecodeTile(16, 4, 2, 2),
}


def decode_tile(spec: AttentionSpec, requests: int, queries: int, processors: int) -> DecodeTile:
    """The tile for a step of so many requests with ``queries`` each, on so many multiprocessors."""
    dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    if spec.dtype == torch.float32:
        return _FLOAT32[dim]
    columns, size = queries * spec.num_heads // spec.num_kv_heads, spec.kv_dtype.itemsize
    if columns > 32:
        return _WIDE
    items = requests * spec.num_kv_heads / processors
    if items < (4.5 if size == 1 else 3.5) or (columns > 8 and dim > 128):
        return _FEW[dim]
    if columns > 8:
        return _MANY_TO_VERIFY
    many, once = _MANY[dim, size], _ONE_ROUND.get((dim, size))
    return once if once is not None and items <= once.programs else many


def processors_of(device: torch.device) -> int:
    """Multiprocessors of ``device``; a few where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
