"""Second pass of a draw with top-k: one program a row, on the few tokens that the k best can be among.

The k-th largest of the groups' best logits is no more than the k-th largest logit, k groups having a token that good.
So the tokens at or above it are a superset of the top k, hardly larger than k when good tokens are spread over the
vocabulary. They are gathered in the order of their ids and compared each with each, which gives every token's rank and
the mass above it, so that the allowed ones are known outright.

Where k is large or too many tokens qualify the row is read instead, up to 32 times for the k-th value and then in the
turns of ``settle``, whose argument holds here too: slow, and exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel
from quire.core.sample.kernels.row import best_noised_of_chunk, count_at_least, sum_masses
from quire.core.sample.kernels.token_feedback import store_sampled_token

__all__ = ["sample_topk_candidates_kernel"]


@triton.jit(do_not_specialize=["padding_row"])
def sample_topk_candidates_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    group_max_ptr,
    group_list_ptr,
    list_logit_ptr,
    list_token_ptr,
    list_above_ptr,
    out_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    stride,
    token_stride,
    padding_row,
    vocab: tl.constexpr,
    splits: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    num_groups_block: tl.constexpr,
    capacity: tl.constexpr,
    most_k: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    others: tl.constexpr,
    feed: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (n,). Rows without a top-k are another kernel's."""
    line = tl.program_id(0).to(tl.int64)
    row = line
    if feed:
        row = tl.load(rows_ptr + line)
    if not feed or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        if (temperature > 0.0) & (top_k > 0):
            num_groups: tl.constexpr = splits * groups
            scale = 1.0 / temperature
            row_ptr = logits_ptr + line * stride
            place = tl.arange(0, num_groups_block)
            peaks = tl.load(
                group_max_ptr + line * num_groups + place, mask=place < num_groups, other=float("-inf")
            )  # fmt: skip
            largest = tl.maximum(tl.max(peaks, axis=0), -1e30)
            min_p = tl.load(min_p_ptr + row)
            lowest = tl.where(min_p > 0.0, largest + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
            count = tl.full((), capacity + 1, tl.int32)
            if top_k <= most_k:
                bound = tl.maximum(_find_group_bound(peaks, top_k, largest), lowest)
                count = _gather_candidates(
                    row_ptr, scale, bound, peaks, group_list_ptr + line * num_groups, list_logit_ptr + line * capacity,
                    list_token_ptr + line * capacity, vocab, groups, width, num_groups_block, capacity,
                )  # fmt: skip
            top_p = tl.load(top_p_ptr + row)
            seed = tl.load(seed_ptr + row)
            position = tl.load(position_ptr + row)
            token = tl.full((), vocab, tl.int32)
            if count <= capacity:
                token = _sample_candidates(
                    list_logit_ptr + line * capacity, list_token_ptr + line * capacity,
                    list_above_ptr + line * capacity, count, top_k, top_p, seed, position, largest,
                    vocab, capacity, block, others, fast,
                )  # fmt: skip
            else:
                token = _sample_whole_row(
                    row_ptr,
                    scale,
                    lowest,
                    top_k,
                    top_p,
                    seed,
                    position,
                    largest,
                    vocab,
                    tile,
                    (vocab + tile - 1) // tile,
                    fast,
                )
            store_sampled_token(token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed)


@triton.jit
def _find_group_bound(peaks, top_k, largest):
    """A value that ``top_k`` of ``peaks`` reach and few more do, or minus infinity."""
    low = tl.min(tl.where(peaks > float("-inf"), peaks, largest), axis=0)
    high = largest
    found = tl.sum((peaks >= low).to(tl.int32), axis=0)
    low = tl.where(found < top_k, float("-inf"), low)
    turn = tl.full((), 0, tl.int32)
    while (turn < 24) & (found > top_k + top_k // 8):
        middle = low + (high - low) * 0.5
        reach = tl.sum((peaks >= middle).to(tl.int32), axis=0)
        enough = reach >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, reach, found)
        turn += 1
    return low


@triton.jit
def _gather_candidates(
    row_ptr, scale, bound, peaks, group_list_ptr, list_logit_ptr, list_token_ptr,
    vocab: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, num_groups_block: tl.constexpr,
    capacity: tl.constexpr,
):  # fmt: skip
    """Write tokens of ``bound`` or more, by id, with their logits. Returns how many there are, the first ``capacity``
    of which were written."""
    chosen = ((peaks >= bound) & (peaks > float("-inf"))).to(tl.int32)
    order = tl.cumsum(chosen, axis=0) - 1
    tl.store(group_list_ptr + order, tl.arange(0, num_groups_block), mask=chosen > 0)
    tl.debug_barrier()
    num_chosen = tl.sum(chosen, axis=0)
    count = tl.full((), 0, tl.int32)
    for first in range(0, num_chosen, groups):
        which = first + tl.arange(0, groups)
        group = tl.load(group_list_ptr + which, mask=which < num_chosen, other=num_groups_block)
        at = group[:, None] * width + tl.arange(0, width)[None, :]
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * scale
        hit = ((x >= bound) & (x > float("-inf"))).to(tl.int32)
        hits = tl.sum(hit, axis=1)
        start = count + tl.cumsum(hits, axis=0) - hits
        to = start[:, None] + tl.cumsum(hit, axis=1) - 1
        tl.store(list_logit_ptr + to, x, mask=(hit > 0) & (to < capacity))
        tl.store(list_token_ptr + to, at, mask=(hit > 0) & (to < capacity))
        count += tl.sum(hits, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _sortable_key(x):
    """An int64 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _float_of_key(key):
    """The float32 of a scalar ``_key``."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _sample_candidates(
    list_logit_ptr, list_token_ptr, list_above_ptr, count, top_k, top_p, seed, position, largest,
    vocab: tl.constexpr, capacity: tl.constexpr, block: tl.constexpr, others: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The token of a list to which min-p was applied: each is compared with each, for its rank and the mass above."""
    least = tl.full((), float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, count, block):
        at = first + tl.arange(0, block)
        x = tl.load(list_logit_ptr + at, mask=at < count, other=float("-inf"))
        rank = tl.zeros((block,), tl.int32)
        above = tl.zeros((block,), tl.float32)
        for start in range(0, count, others):
            other = start + tl.arange(0, others)
            y = tl.load(list_logit_ptr + other, mask=other < count, other=float("-inf"))
            higher = y[None, :] > x[:, None]
            rank += tl.sum(higher.to(tl.int32), axis=1)
            above += tl.sum(tl.where(higher, device_exp(y - largest, fast)[None, :], 0.0), axis=1)
        tl.store(list_above_ptr + at, above, mask=at < count)
        inside = (at < count) & (rank < top_k)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), axis=0))
        total += tl.sum(tl.where(inside, device_exp(x - largest, fast), 0.0), axis=0)
    tl.debug_barrier()
    at = tl.arange(0, capacity)
    x = tl.load(list_logit_ptr + at, mask=at < count, other=float("-inf"))
    above = tl.load(list_above_ptr + at, mask=at < count, other=float("inf"))
    tokens = tl.load(list_token_ptr + at, mask=at < count, other=vocab)
    enough = tl.where(top_p < 1.0, top_p * total, float("inf"))
    allowed = (at < count) & (x >= least) & ((above < enough) | (above <= 0.0))
    noised = tl.where(allowed, x + device_gumbel(seed, position, tokens, fast), float("-inf"))
    best = tl.max(noised, axis=0)
    return tl.min(tl.where(allowed & (noised == best), tokens, vocab), axis=0)


@triton.jit
def _sample_whole_row(
    row_ptr, scale, lowest, top_k, top_p, seed, position, largest,
    vocab: tl.constexpr, chunk: tl.constexpr, splits: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """As ``_draw``, reading the row each time."""
    floor = tl.maximum(lowest, -3e38)
    high = _sortable_key(largest)
    low = tl.minimum(_sortable_key(floor), high)
    found = count_at_least(row_ptr, scale, _float_of_key(low), vocab, chunk, splits)
    while (low < high) & (found > top_k):
        middle = (low + high + 1) // 2
        reach = count_at_least(row_ptr, scale, _float_of_key(middle), vocab, chunk, splits)
        enough = reach >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        found = tl.where(enough, reach, found)
    lowest = _float_of_key(low)
    pivot = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), vocab, tl.int32)
    again = tl.full((), 1, tl.int32)
    while again > 0:
        best = tl.full((), float("-inf"), tl.float32)
        logit = tl.full((), float("-inf"), tl.float32)
        token = tl.full((), vocab, tl.int32)
        for index in range(splits):
            best, logit, token = best_noised_of_chunk(
                row_ptr, index, scale, lowest, pivot, seed, position, best, logit, token, vocab, chunk, fast
            )
        pivot = logit
        above, _, kept = sum_masses(row_ptr, scale, lowest, pivot, pivot, largest, 0, splits, vocab, chunk, fast)
        out = (token < vocab) & (top_p < 1.0) & (above >= top_p * kept) & (above > 0.0)
        again = out.to(tl.int32)
    return token
