"""Tile shapes of the decode kernel: measured on Hopper by head dimension and element size, with fallbacks for the rest.

Which table serves a step depends on how full it makes the GPU, counted in work items (a KV head of a request) per SM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from quire.sdk import AttentionSpec

__all__ = ["DecodeTile", "choose_decode_tile"]


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program of the decode kernel works, and how many programs run on an SM at a time."""

    block_n: int
    """Keys per tile."""
    num_warps: int
    num_stages: int
    programs_per_sm: int


_SMALL_BATCH = {
    64: DecodeTile(64, 4, 3, 4),
    128: DecodeTile(64, 4, 3, 4),
    256: DecodeTile(32, 4, 3, 2),
}
"""head_dim -> tile, for steps that do not fill the GPU: wide tiles keep enough bytes in flight on each SM."""
_LARGE_BATCH = {
    (64, 1): DecodeTile(32, 1, 3, 8),
    (128, 1): DecodeTile(32, 1, 3, 8),
    (256, 1): DecodeTile(32, 1, 3, 3),
    (64, 2): DecodeTile(32, 1, 3, 8),
    (128, 2): DecodeTile(32, 1, 3, 6),
    (256, 2): DecodeTile(32, 2, 3, 3),
}
"""(head_dim, bytes of a key's element) -> tile, for steps that fill the GPU. A program of a single warp exchanges
nothing between warps."""
_SINGLE_WAVE = {(128, 2): DecodeTile(32, 1, 2, 8)}
"""Where ``programs_per_sm`` programs on every SM hold all work items of such a step at once."""
_LARGE_BATCH_VERIFY = DecodeTile(32, 2, 3, 6)
"""Up to 32 packed query rows (queries * GQA group), up to 128 elements a head."""
_MANY_QUERY_ROWS = DecodeTile(32, 4, 3, 2)
"""More than 32 packed query rows."""
_FLOAT32 = {
    64: DecodeTile(32, 4, 2, 4),
    128: DecodeTile(32, 8, 2, 2),
    256: DecodeTile(16, 4, 2, 2),
}


def choose_decode_tile(spec: AttentionSpec, num_reqs: int, query_len: int, num_sms: int) -> DecodeTile:
    """The tile for a step of ``num_reqs`` decodes with ``query_len`` queries each, on ``num_sms`` SMs."""
    head_dim = triton.next_power_of_2(max(spec.qk_head_dim, spec.v_head_dim, 64))
    if spec.dtype == torch.float32:
        return _FLOAT32[head_dim]
    query_rows, itemsize = query_len * spec.num_heads // spec.num_kv_heads, spec.kv_dtype.itemsize
    if query_rows > 32:
        return _MANY_QUERY_ROWS
    items_per_sm = num_reqs * spec.num_kv_heads / num_sms
    if items_per_sm < (4.5 if itemsize == 1 else 3.5) or (query_rows > 8 and head_dim > 128):
        return _SMALL_BATCH[head_dim]
    if query_rows > 8:
        return _LARGE_BATCH_VERIFY
    single_wave = _SINGLE_WAVE.get((head_dim, itemsize))
    if single_wave is not None and items_per_sm <= single_wave.programs_per_sm:
        return single_wave
    return _LARGE_BATCH[head_dim, itemsize]
