"""Persistent tile scheduler of the Hopper prefill kernel, as FlashAttention-3's dynamic scheduler.

Producer warps claim query tiles from a counter in memory, so that a program that ends early takes more of them, and
publish them to the consumer warpgroups of their program through two slots in shared memory. Gluon has no records; a
tile is a tuple in the order that ``_compute_tile`` gives.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["BLOCK_M", "claim_tile", "publish_tile", "receive_tile"]

BLOCK_M = gl.constexpr(128)
"""GQA-packed query rows of a tile."""


@gluon.jit
def claim_tile(tile_counter_ptr, num_tiles, batch, num_kv_heads: gl.constexpr, group_size: gl.constexpr):
    """The next query tile that has rows and is not claimed, as from ``_compute_tile``. The last claim of all clears the
    counter."""
    index = gl.atomic_add(tile_counter_ptr, 1, sem="relaxed")
    tile = _compute_tile(index, num_tiles, batch, num_kv_heads, group_size)
    while (tile[6] == 0) & (index < num_tiles):
        index = gl.atomic_add(tile_counter_ptr, 1, sem="relaxed")
        tile = _compute_tile(index, num_tiles, batch, num_kv_heads, group_size)
    # Every program claims until it gets an index >= num_tiles, so this is the largest index that any gets.
    if index == num_tiles + gl.num_programs(0) - 1:
        gl.atomic_xchg(tile_counter_ptr, 0, sem="relaxed")
    return tile


@gluon.jit
def _compute_tile(index, num_tiles, batch, num_kv_heads: gl.constexpr, group_size: gl.constexpr):
    """(request, kv_head, query_start, query_len, row_start, context_len, kv_end) of a query tile; ``kv_end`` 0: it has
    no rows.

    A prompt's last tiles have the most keys, so they have the smallest indices.
    """
    seq_lens_ptr, query_start_ptr, num_decodes, num_reqs = batch
    exists = index < num_tiles
    index = gl.minimum(index, num_tiles - 1)
    kv_head = index % num_kv_heads
    index = (num_tiles - 1 - index) // num_kv_heads
    first_token = gl.load(query_start_ptr + num_decodes)
    left = num_decodes
    right = num_reqs
    while right - left > 1:  # bisection for the last request whose tiles begin at or before index
        middle = (left + right) // 2
        query_start = gl.load(query_start_ptr + middle)
        begins_before = _get_first_tile(query_start, first_token, middle - num_decodes, group_size) <= index
        left = gl.where(begins_before, middle, left)
        right = gl.where(begins_before, right, middle)
    query_start = gl.load(query_start_ptr + left)
    query_len = gl.load(query_start_ptr + left + 1) - query_start
    row_start = (index - _get_first_tile(query_start, first_token, left - num_decodes, group_size)) * BLOCK_M
    context_len = gl.load(seq_lens_ptr + left) - query_len
    kv_end = gl.minimum(context_len + (row_start + BLOCK_M - 1) // group_size + 1, context_len + query_len)
    kv_end = gl.where(exists & (row_start < query_len * group_size), kv_end, 0)
    return left, kv_head, query_start, query_len, row_start, context_len, kv_end


@gluon.jit
def _get_first_tile(query_start, first_token, ordinal, group_size: gl.constexpr):
    """Index of a request's first query tile; whatever the rounding, every request before it has room for its tiles."""
    return (query_start - first_token) * group_size // BLOCK_M + ordinal


@gluon.jit
def publish_tile(tile_queue, tile_iter, tile):
    """Pass a tile but for its request on to the consumers, through one of two slots; ``kv_end`` 0 ends their work."""
    smem, full, empty = tile_queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = tile_iter % 2
    mbarrier.wait(empty.index(slot), (tile_iter // 2 & 1) ^ 1)
    for i in gl.static_range(6):
        smem.index(6 * slot + i).store(gl.full([1], tile[i + 1], gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def receive_tile(tile_queue, tile_iter):
    """The next tile: (kv_head, query_start, query_len, row_start, context_len, kv_end)."""
    smem, full, empty = tile_queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = tile_iter % 2
    mbarrier.wait(full.index(slot), tile_iter // 2 & 1)
    tile = ()
    for i in gl.static_range(6):
        # A sum over one element makes a scalar of it.
        tile = tile + (gl.sum(smem.index(6 * slot + i).load(layout), 0),)  # type: ignore[assignment]  # noqa: RUF005
    mbarrier.arrive(empty.index(slot), count=1)
    return tile
