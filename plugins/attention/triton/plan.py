"""The work list of a decode step, made on the device once a step: every request cut into parts of equal size.

Grids are fixed when a step is captured, and lengths are not: so a fixed number of programs share a list whose length
only the device knows. The size of a part is the one that should finish first by a small model of the kernel: what the
programs carry on average, the longest part, and a merge where a request has several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.core.contracts.attention import AttentionBatch, AttentionLimits, AttentionSpec
from quire.plugins.attention.triton.tuning import decode_tile, processors_of

__all__ = ["DecodePlan", "plan_kernel"]

_ITEMS = 16
"""Parts beyond one a request that a list has room for, times the KV heads, for each multiprocessor."""
_SHORTEST = 64
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
        self.tile = decode_tile(spec, many=False)
        longest = limits.max_model_len if spec.window is None else min(limits.max_model_len, spec.window)
        self.split = split
        self.levels = max(1, (-(-longest // _SHORTEST) - 1).bit_length() + 1)
        spare = _ITEMS * self.processors // heads + 1  # programs beyond the list's end read an entry too
        most = limits.max_num_reqs * (min(32, -(-longest // split)) if split else 1) + spare
        self.most_parts = -(-longest // (split or _SHORTEST))
        self.kv_heads = heads
        self.window = spec.window or 0
        self.block = triton.next_power_of_2(limits.max_num_reqs)
        self.items = torch.zeros(most, 4, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.taken = torch.zeros(1, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(limits.max_num_reqs * heads, dtype=torch.int32, device=device)
        rows = spec.num_heads // heads * limits.max_decode_query_len
        self.parts = torch.empty(most, heads, rows, spec.v_head_dim, dtype=torch.float32, device=device)
        self.part_lse = torch.empty(most, heads, rows, dtype=torch.float32, device=device)

    def write(self, batch: AttentionBatch) -> None:
        """List the parts of the step's decodes, for the tile that suits so many."""
        few = decode_tile(self.spec, many=False)
        many = not self.split and batch.num_decodes * self.kv_heads > few.programs * self.processors
        self.tile = decode_tile(self.spec, many, batch.decode_query_len)
        plan_kernel[(1,)](
            batch.seq_lens,
            self.items,
            self.count,
            batch.num_decodes,
            self.processors * self.tile.programs,
            room=len(self.items),
            kv_heads=self.kv_heads,
            seen=self.window and self.window + batch.decode_query_len - 1,
            shortest=_SHORTEST,
            levels=self.levels,
            split=self.split,
            full=1.25 * self.tile.programs,
            block=self.block,
            num_warps=4,
        )

    def grid(self, batch: AttentionBatch) -> int:
        """Programs of a step: all that run at a time, or fewer where the step cannot have as many parts."""
        length = min(batch.max_seq_len, self.window + batch.decode_query_len - 1 if self.window else batch.max_seq_len)
        parts = max(1, min(self.most_parts, -(-length // (self.split or _SHORTEST))))
        return min(self.processors * self.tile.programs, batch.num_decodes * parts * self.kv_heads)


@triton.jit(do_not_specialize=["num_decodes", "programs"])
def plan_kernel(
    seq_lens_ptr,  # (num_reqs,) int32
    items_ptr,  # (room, 4) int32: request, first key, end, part | parts << 16
    count_ptr,  # (1,) int32: items written
    num_decodes,
    programs,
    room: tl.constexpr,
    kv_heads: tl.constexpr,
    seen: tl.constexpr,
    shortest: tl.constexpr,
    levels: tl.constexpr,
    split: tl.constexpr,
    full: tl.constexpr,
    block: tl.constexpr,
):
    """One program. Requests of longer parts come first; the parts of one are neighbours, in order.

    ``seen``: the last keys of a request that its queries see, 0: all.
    """
    request = tl.arange(0, block)
    seq_len = tl.load(seq_lens_ptr + request, mask=request < num_decodes, other=0)
    length = _seen(seq_len, seen)
    best = 0
    if split == 0:
        keys = tl.sum(length)
        longest = tl.max(length)
        best_cost = float("inf")
        # Costs in units of 0.8 us, the time of a tile of 64 keys on an idle H200; with every program at work a tile
        # takes ``full`` times as long. A program loses 3 between two items, 11 more where they are merged later.
        for level in tl.static_range(levels):
            part = shortest << level
            parts = (length + (part - 1)) // part
            count = tl.sum(parts)
            fits = (count <= room) | (level == levels - 1)
            merged = tl.sum(tl.where(parts > 1, parts, 0))
            rounds = count * kv_heads / programs
            pauses = tl.maximum(rounds - 1.0, 0.0) * 3.0 + tl.maximum(merged * kv_heads / programs - 1.0, 0.0) * 11.0
            share = keys * full / 64 * kv_heads / programs + pauses
            last = tl.minimum(longest, part) / 64.0
            uneven = last - (rounds - tl.floor(rounds - 0.001)) * last * full  # the last round is not full
            late = last * tl.minimum(rounds, 1.0) * full - share  # a long part that begins last
            cost = share + tl.maximum(0.5 * late, tl.maximum(uneven, 0.0))
            if longest > part:
                cost += 1.5 + 0.2 * longest / part
            better = fits & (cost < best_cost)
            best = tl.where(better, part, best)
            best_cost = tl.where(better, cost, best_cost)
    parts, size = _cut(length, best, split)
    first = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, num_decodes, 16):
        other = start + tl.arange(0, 16)
        others = _seen(tl.load(seq_lens_ptr + other, mask=other < num_decodes, other=0), seen)
        other_parts, other_size = _cut(others, best, split)
        earlier = other_size[None, :] > size[:, None]
        earlier |= (other_size[None, :] == size[:, None]) & (other[None, :] < request[:, None])
        first += tl.sum(tl.where(earlier, other_parts[None, :], 0), 1)
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
def _seen(seq_len, seen: tl.constexpr):
    """Keys that a request's queries see."""
    return tl.minimum(seq_len, seen) if seen > 0 else seq_len


@triton.jit
def _cut(length, most, split: tl.constexpr):
    """(parts, keys in each but the last) of so many keys: as equal as may be, ``most`` or fewer."""
    if split > 0:
        most = tl.maximum(((length + split - 1) // split + 31) // 32, 1) * split
    parts = (length + most - 1) // most
    size = (length + parts - 1) // tl.maximum(parts, 1)
    size = tl.minimum(tl.maximum((size + 31) // 32, 1) * 32, most)
    return (length + size - 1) // size, size
