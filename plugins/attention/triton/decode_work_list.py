"""The work list of a decode step, made on the device once a step: long requests first, cut where that pays.

Grids are fixed when a step is captured, and lengths are not: so a fixed number of programs share a list whose length
only the device knows. The GPU starts them in order, one where another has ended, so that unequal lengths even out
(longest processing time first: Graham, 1969).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.plugins.attention.triton.tuning import decode_tile, processors_of
from quire.sdk import AttentionBatch, AttentionLimits, AttentionSpec

__all__ = ["DecodePlan", "plan_kernel"]

_ITEMS = 32
"""Parts beyond one a request that a list has room for, times the KV heads, for each multiprocessor."""
_SHORTEST = 128
"""Keys in the smallest part."""


class DecodePlan:
    """The list and what the kernel needs beside it. ``split``: keys in every part, 0 to choose for each step.

    With a given size, parts grow with a request's own length once it has 32 of them, and its result does not depend on
    what else is in the step.
    """

    def __init__(self, spec: AttentionSpec, limits: AttentionLimits, split: int) -> None:
        device, heads = limits.device, spec.num_kv_heads
        self.spec = spec
        self.processors = processors_of(device)
        self.tile = decode_tile(spec, 1, 1, self.processors)
        longest = limits.max_model_len if spec.window is None else min(limits.max_model_len, spec.window)
        self.split = split
        spare = _ITEMS * self.processors // heads + 1  # programs beyond the list's end read an entry too
        most = limits.max_num_reqs * (min(32, -(-longest // split)) if split else 1) + spare
        self.most_parts = -(-longest // (split or _SHORTEST))
        self.kv_heads = heads
        self.window = spec.window or 0
        self.block = triton.next_power_of_2(limits.max_num_reqs)
        self.order = torch.zeros(self.block, dtype=torch.int32, device=device)
        self.items = torch.zeros(most, 4, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(limits.max_num_reqs * heads, dtype=torch.int32, device=device)
        self.most_queries = limits.max_decode_query_len
        rows = spec.num_heads // heads * self.most_queries
        self.parts = torch.empty(most, heads, rows, spec.v_head_dim, dtype=torch.float32, device=device)
        self.part_lse = torch.empty(most, heads, rows, dtype=torch.float32, device=device)

    def write(self, batch: AttentionBatch) -> None:
        """List the parts of the step's decodes, for the tile that suits so many."""
        assert batch.decode_query_len <= self.most_queries, "more queries than prepare() was told of"
        self.tile = decode_tile(
            self.spec, 1 if self.split else batch.num_decodes, batch.decode_query_len, self.processors
        )
        plan_kernel[(1,)](
            batch.seq_lens,
            self.order,
            self.items,
            self.count,
            batch.num_decodes,
            self.processors * self.tile.programs,
            room=len(self.items),
            kv_heads=self.kv_heads,
            seen=self.window and self.window + batch.decode_query_len - 1,
            split=self.split,
            shortest=_SHORTEST,
            block=self.block,
            num_warps=4,
        )

    def grid(self, batch: AttentionBatch) -> int:
        """Programs of a step: one for each item, as a rule. Programs without one end at once; where there are more
        items, because many requests are cut, programs do several."""
        length = min(batch.max_seq_len, self.window + batch.decode_query_len - 1 if self.window else batch.max_seq_len)
        parts = max(1, min(self.most_parts, -(-length // (self.split or _SHORTEST))))
        whole = batch.num_decodes * self.kv_heads
        return min(max(self.processors * self.tile.programs, whole), whole * parts)


@triton.jit(do_not_specialize=["num_decodes", "programs"])
def plan_kernel(
    seq_lens_ptr,  # (num_reqs,) int32
    order_ptr,  # (block,) int32: requests, longest first
    items_ptr,  # (room, 4) int32: request, first key, end, part | parts << 16
    count_ptr,  # (1,) int32: items written
    num_decodes,
    programs,
    room: tl.constexpr,
    kv_heads: tl.constexpr,
    seen: tl.constexpr,
    split: tl.constexpr,
    shortest: tl.constexpr,
    block: tl.constexpr,
):
    """One program. Longer requests come first; the parts of one are neighbours, in order.

    ``seen``: the last keys of a request that its queries see, 0: all.
    """
    request = tl.arange(0, block)
    length = _length(seq_lens_ptr, request, num_decodes, seen)
    rank = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, num_decodes, 16):
        other = start + tl.arange(0, 16)
        others = _length(seq_lens_ptr, other, num_decodes, seen)
        earlier = (others[None, :] > length[:, None]) | (
            (others[None, :] == length[:, None]) & (other[None, :] < request[:, None])
        )
        rank += tl.sum((earlier & (other < num_decodes)[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + rank, request, mask=request < num_decodes)
    tl.debug_barrier()
    place = tl.arange(0, block)
    request = tl.load(order_ptr + place, mask=place < num_decodes, other=0)
    length = tl.where(place < num_decodes, _length(seq_lens_ptr, request, num_decodes, seen), 0)
    if split > 0:
        most = tl.maximum(((length + split - 1) // split + 31) // 32, 1) * split
    else:
        # Nothing is cut while the longest fits beside what a program carries on average: merging costs more than an
        # uneven end. Else the smallest parts that are not too many for one round; many rounds even out by themselves.
        share = tl.sum(length) * (kv_heads / programs)  # keys of a program
        longest = tl.max(length)
        least = tl.maximum(tl.maximum(share, 4 * tl.sqrt(longest.to(tl.float32))), shortest)
        best = least.to(tl.int32)
        for i in tl.static_range(9, -1, -1):
            part = (least * 1.15**i).to(tl.int32)
            best = tl.where(tl.sum((length + part - 1) // part) * kv_heads <= programs, part, best)
        most = tl.zeros((block,), dtype=tl.int32) + tl.where(longest > 2.5 * share, best, longest)
    parts, size = _cut(length, most)
    fits = tl.sum(parts) <= room
    parts = tl.where(fits, parts, tl.minimum(length, 1))
    size = tl.where(fits, size, tl.maximum(length, 1))
    first = tl.cumsum(parts, 0) - parts
    seq_len = tl.load(seq_lens_ptr + request, mask=place < num_decodes, other=0)
    for index in range(tl.max(parts)):
        low = seq_len - length + index * size
        at = items_ptr + (first + index) * 4
        live = index < parts
        tl.store(at, request, mask=live)
        tl.store(at + 1, low, mask=live)
        tl.store(at + 2, tl.minimum(low + size, seq_len), mask=live)
        tl.store(at + 3, index + (parts << 16), mask=live)
    tl.store(count_ptr, tl.sum(parts))


@triton.jit
def _length(seq_lens_ptr, request, num_decodes, seen: tl.constexpr):
    """Keys that a request's queries see."""
    seq_len = tl.load(seq_lens_ptr + request, mask=request < num_decodes, other=0)
    return tl.minimum(seq_len, seen) if seen > 0 else seq_len


@triton.jit
def _cut(length, most):
    """(parts, keys in each but the last) of so many keys: as equal as may be, ``most`` or a few more."""
    parts = (length + most - 1) // most
    size = (length + parts - 1) // tl.maximum(parts, 1)
    size = tl.minimum(tl.maximum((size + 31) // 32, 1) * 32, tl.maximum(most, 32))
    return (length + size - 1) // size, size
