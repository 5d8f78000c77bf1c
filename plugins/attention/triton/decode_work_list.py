"""The work list of a decode step: split-KV work items, written on the device once a step.

A CUDA graph fixes the grid, but not the context lengths. So a fixed number of programs share a list whose length only
the device knows (FlashInfer's scheduler does the same on the host, per ``plan``: Ye et al., 2025, arXiv:2501.01005).

1. Rank the requests by the keys that they must read, longest first (longest processing time first: Graham, 1969). The
   GPU starts programs in order, one where another has ended, so that unequal lengths even out.
2. Choose how many keys a split holds at most. Without ``fixed_split_size``: no split while the longest request fits
   beside what a program reads on average, since merging costs more than an uneven end; else the smallest size that
   gives no more work items than programs run at once.
3. Write ``(request, first key, end, split index | number of splits << 16)`` for each split; the splits of a request are
   neighbours, in order. Each entry stands for ``num_kv_heads`` work items.

One program; it reads ``num_decodes`` lengths and writes 16 bytes per split.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from quire.plugins.attention.triton.tuning import choose_decode_tile
from quire.sdk import AttentionBatch, AttentionLimits, AttentionSpec
from quire.sdk.ops import DeviceProfile

__all__ = ["DecodeWorkList"]

_EXTRA_ITEMS_PER_SM = 32
"""Work items that the list has room for on each SM, beyond one split per request."""
_MIN_SPLIT_SIZE = 128
"""Keys in the smallest split, where the size is chosen."""
_MAX_FIXED_SPLITS = tl.constexpr(32)
"""Splits of a request under ``fixed_split_size``; a longer request gets splits of a multiple of that size."""


class DecodeWorkList:
    """Work items of one group's decodes, and the workspaces that their partial results are written to.

    With ``fixed_split_size`` (0: choose for each step) the splits of a request depend on its own length alone, so that
    its result does not depend on what else is in the step.
    """

    def __init__(self, spec: AttentionSpec, limits: AttentionLimits, fixed_split_size: int) -> None:
        device, num_kv_heads = limits.device, spec.num_kv_heads
        self.spec = spec
        self.num_sms = DeviceProfile.detect(device).num_sms
        self.tile = choose_decode_tile(spec, 1, 1, self.num_sms)
        """Of the step that was built last."""
        self.fixed_split_size = fixed_split_size
        self.max_query_len = limits.max_decode_query_len
        self.window = spec.window or 0
        max_kv_len = limits.max_model_len if spec.window is None else min(limits.max_model_len, spec.window)
        self.max_splits = -(-max_kv_len // (fixed_split_size or _MIN_SPLIT_SIZE))
        fixed_splits = min(_MAX_FIXED_SPLITS.value, -(-max_kv_len // fixed_split_size)) if fixed_split_size else 1
        # One entry more: programs beyond the list's end load an entry before they see that there is none for them.
        extra = _EXTRA_ITEMS_PER_SM * self.num_sms // num_kv_heads + 1
        self.max_entries = limits.max_num_reqs * fixed_splits + extra
        self.sort_size = triton.next_power_of_2(limits.max_num_reqs)
        query_rows = spec.num_heads // num_kv_heads * self.max_query_len
        int_zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        empty_floats = partial(torch.empty, dtype=torch.float32, device=device)
        self.sorted_requests = int_zeros(self.sort_size)
        self.entries = int_zeros(self.max_entries, 4)
        self.num_entries = int_zeros(1)
        self.splits_done = int_zeros(limits.max_num_reqs * num_kv_heads)
        self.partial_out = empty_floats(self.max_entries, num_kv_heads, query_rows, spec.v_head_dim)
        self.partial_lse = empty_floats(self.max_entries, num_kv_heads, query_rows)

    def build(self, batch: AttentionBatch) -> None:
        """Write the list for the decodes of ``batch``, and choose the tile that suits so many. One launch."""
        assert batch.decode_query_len <= self.max_query_len, "more queries than AttentionLimits allow"
        # A tile that depends on the batch would round differently; a fixed split size promises that it does not.
        num_reqs = 1 if self.fixed_split_size else batch.num_decodes
        self.tile = choose_decode_tile(self.spec, num_reqs, batch.decode_query_len, self.num_sms)
        _decode_work_list_kernel[(1,)](
            batch.seq_lens,
            self.sorted_requests,
            self.entries,
            self.num_entries,
            batch.num_decodes,
            self.num_sms * self.tile.programs_per_sm,
            max_entries=self.max_entries,
            num_kv_heads=self.spec.num_kv_heads,
            max_kv_len=self.window and self.window + batch.decode_query_len - 1,
            fixed_split_size=self.fixed_split_size,
            min_split_size=_MIN_SPLIT_SIZE,
            sort_size=self.sort_size,
            num_warps=4,
        )

    def compute_grid_size(self, batch: AttentionBatch) -> int:
        """Programs of a step, from host bounds alone: as a rule one for each work item. Programs without an item end at
        once; where there are more items than programs, because many requests are split, programs do several."""
        kv_len = batch.max_seq_len
        if self.window:
            kv_len = min(kv_len, self.window + batch.decode_query_len - 1)
        num_splits = max(1, min(self.max_splits, -(-kv_len // (self.fixed_split_size or _MIN_SPLIT_SIZE))))
        num_unsplit_items = batch.num_decodes * self.spec.num_kv_heads
        return min(max(self.num_sms * self.tile.programs_per_sm, num_unsplit_items), num_unsplit_items * num_splits)

    def needs_even_start(self, batch: AttentionBatch) -> bool:
        """Whether a step's programs must start when the kernel before has left the GPU. With more work items than SMs,
        and no more than programs run at a time, an SM does as many items as found room there: beside the last programs
        of another kernel some SMs get twice their share, and the step waits for them. Items are counted as if no
        request were split, which the host does not know."""
        num_items = batch.num_decodes * self.spec.num_kv_heads
        return self.num_sms < num_items <= self.num_sms * self.tile.programs_per_sm


@triton.jit(do_not_specialize=["num_decodes", "num_programs"])
def _decode_work_list_kernel(
    seq_lens_ptr,  # (num_reqs,) int32
    sorted_ptr,  # (sort_size,) int32: requests, longest first
    entries_ptr,  # (max_entries, 4) int32: request, first key, end, split | num_splits << 16
    num_entries_ptr,  # (1,) int32
    num_decodes,
    num_programs,  # of the decode kernel that run at a time
    max_entries: tl.constexpr,
    num_kv_heads: tl.constexpr,
    max_kv_len: tl.constexpr,  # keys that a request's queries see in a sliding window; 0: all
    fixed_split_size: tl.constexpr,
    min_split_size: tl.constexpr,
    sort_size: tl.constexpr,
):
    # 1. Rank by counting the requests that come earlier: num_decodes**2 comparisons, 16 requests at a time.
    request = tl.arange(0, sort_size)
    kv_len = _load_kv_len(seq_lens_ptr, request, num_decodes, max_kv_len)
    rank = tl.zeros((sort_size,), dtype=tl.int32)
    for start in range(0, num_decodes, 16):
        other = start + tl.arange(0, 16)
        other_kv_len = _load_kv_len(seq_lens_ptr, other, num_decodes, max_kv_len)
        is_earlier = (other_kv_len[None, :] > kv_len[:, None]) | (
            (other_kv_len[None, :] == kv_len[:, None]) & (other[None, :] < request[:, None])
        )
        rank += tl.sum((is_earlier & (other < num_decodes)[None, :]).to(tl.int32), 1)
    tl.store(sorted_ptr + rank, request, mask=request < num_decodes)
    tl.debug_barrier()  # the permutation goes through memory: all of it is written before any of it is read
    place = tl.arange(0, sort_size)
    request = tl.load(sorted_ptr + place, mask=place < num_decodes, other=0)
    kv_len = tl.where(place < num_decodes, _load_kv_len(seq_lens_ptr, request, num_decodes, max_kv_len), 0)

    # 2. The most keys of a split.
    if fixed_split_size > 0:
        num_sizes = (kv_len + fixed_split_size - 1) // fixed_split_size
        multiple = tl.maximum((num_sizes + (_MAX_FIXED_SPLITS - 1)) // _MAX_FIXED_SPLITS, 1)
        split_limit = multiple * fixed_split_size
    else:
        keys_per_program = tl.sum(kv_len) * (num_kv_heads / num_programs)
        longest = tl.max(kv_len)
        # 4 * sqrt(longest) minimises size + 16 * longest / size: the keys of a split, and a merge in which each of the
        # longest request's splits costs as much as 16 keys.
        smallest = tl.maximum(tl.maximum(keys_per_program, 4 * tl.sqrt(longest.to(tl.float32))), min_split_size)
        size = smallest.to(tl.int32)
        # From the largest candidate down: the last that fits in one wave of programs is the smallest.
        for i in tl.static_range(9, -1, -1):
            candidate = (smallest * 1.15**i).to(tl.int32)
            num_items = tl.sum((kv_len + candidate - 1) // candidate) * num_kv_heads
            size = tl.where(num_items <= num_programs, candidate, size)
        # Many waves even out by themselves: then, or where the longest is not much above the average, nothing is split.
        split_limit = tl.zeros((sort_size,), dtype=tl.int32) + tl.where(longest > 2.5 * keys_per_program, size, longest)
    num_splits, split_size = _split_evenly(kv_len, split_limit)

    # 3. Write the entries. A list that would overflow has no splits at all: one entry per request always fits.
    fits = tl.sum(num_splits) <= max_entries
    num_splits = tl.where(fits, num_splits, tl.minimum(kv_len, 1))
    split_size = tl.where(fits, split_size, tl.maximum(kv_len, 1))
    first_entry = tl.cumsum(num_splits, 0) - num_splits
    seq_len = tl.load(seq_lens_ptr + request, mask=place < num_decodes, other=0)
    for split in range(tl.max(num_splits)):
        kv_start = seq_len - kv_len + split * split_size
        entry_ptr = entries_ptr + (first_entry + split) * 4
        exists = split < num_splits
        tl.store(entry_ptr, request, mask=exists)
        tl.store(entry_ptr + 1, kv_start, mask=exists)
        tl.store(entry_ptr + 2, tl.minimum(kv_start + split_size, seq_len), mask=exists)
        tl.store(entry_ptr + 3, split + (num_splits << 16), mask=exists)
    tl.store(num_entries_ptr, tl.sum(num_splits))


@triton.jit
def _load_kv_len(seq_lens_ptr, request, num_decodes, max_kv_len: tl.constexpr):
    """Keys that a request's queries see."""
    seq_len = tl.load(seq_lens_ptr + request, mask=request < num_decodes, other=0)
    return tl.minimum(seq_len, max_kv_len) if max_kv_len > 0 else seq_len


@triton.jit
def _split_evenly(kv_len, split_limit):
    """(number of splits, keys in each but the last), as equal as multiples of 32 allow; at most ``split_limit`` keys,
    or 32 where it is less."""
    num_splits = (kv_len + split_limit - 1) // split_limit
    size = (kv_len + num_splits - 1) // tl.maximum(num_splits, 1)
    size = tl.minimum(tl.maximum((size + 31) // 32, 1) * 32, tl.maximum(split_limit, 32))
    return (kv_len + size - 1) // size, size
