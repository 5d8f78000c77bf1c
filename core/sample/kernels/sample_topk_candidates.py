"""Second pass of sampling with top-k: one program a row, on the few tokens that the k best can be among.

The k-th largest of the groups' best logits is no more than the k-th largest logit, k groups having a token that good.
So the tokens at or above it are a superset of the top k, hardly larger than k when good tokens are spread over the
vocabulary. They are gathered in the order of their ids and compared each with each, which gives every token's rank and
the mass above it, so that the allowed ones are known outright.

Where k is large or too many tokens qualify the row is read instead, up to 32 times for the k-th value and then in the
turns of ``sample_resolve``, whose argument holds here too: slow, and exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel
from quire.core.sample.kernels.sample_row import max_or_nan, sample_whole_row, store_sampled_token

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
    candidate_group_ptr,
    candidate_logit_ptr,
    candidate_token_ptr,
    candidate_mass_ptr,
    out_ptr,
    token_ids_ptr,
    stride,
    token_stride,
    padding_row,
    vocab_size: tl.constexpr,
    num_chunks: tl.constexpr,
    tile_size: tl.constexpr,
    groups_per_chunk: tl.constexpr,
    group_size: tl.constexpr,
    num_groups_block: tl.constexpr,
    max_candidates: tl.constexpr,
    max_topk: tl.constexpr,
    block: tl.constexpr,
    other_block: tl.constexpr,
    append: tl.constexpr,
    mark_invalid: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (n,). Rows without a top-k are ``sample_resolve``'s."""
    logits_row = tl.program_id(0).to(tl.int64)
    row = logits_row
    if append:
        row = tl.load(rows_ptr + logits_row)
    if not append or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        if (temperature > 0.0) & (top_k > 0):
            num_groups: tl.constexpr = num_chunks * groups_per_chunk
            inv_temperature = 1.0 / temperature
            row_ptr = logits_ptr + logits_row * stride
            groups = tl.arange(0, num_groups_block)
            group_max = tl.load(
                group_max_ptr + logits_row * num_groups + groups, mask=groups < num_groups, other=float("-inf")
            )  # fmt: skip
            row_max = max_or_nan(group_max, 0, fast)
            max_logit = tl.maximum(row_max, -1e30)  # finite, also where the whole row is masked
            min_p = tl.load(min_p_ptr + row)
            # p >= min_p * p_max  <=>  logit >= max_logit + log(min_p): min-p needs no softmax.
            min_logit = tl.where(min_p > 0.0, max_logit + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
            count = tl.full((), max_candidates + 1, tl.int32)
            if top_k <= max_topk:
                bound = tl.maximum(_find_group_bound(group_max, top_k, max_logit), min_logit)
                count = _gather_candidates(
                    row_ptr, inv_temperature, bound, group_max, candidate_group_ptr + logits_row * num_groups,
                    candidate_logit_ptr + logits_row * max_candidates,
                    candidate_token_ptr + logits_row * max_candidates, vocab_size, groups_per_chunk, group_size,
                    num_groups_block, max_candidates,
                )  # fmt: skip
            top_p = tl.load(top_p_ptr + row)
            seed = tl.load(seed_ptr + row)
            position = tl.load(position_ptr + row)
            token = tl.full((), vocab_size, tl.int32)
            if count <= max_candidates:
                token = _sample_candidates(
                    candidate_logit_ptr + logits_row * max_candidates,
                    candidate_token_ptr + logits_row * max_candidates,
                    candidate_mass_ptr + logits_row * max_candidates, count, top_k, top_p, seed, position, max_logit,
                    vocab_size, max_candidates, block, other_block, fast,
                )  # fmt: skip
            else:
                token = sample_whole_row(
                    row_ptr,
                    inv_temperature,
                    min_logit,
                    top_k,
                    top_p,
                    seed,
                    position,
                    max_logit,
                    vocab_size,
                    tile_size,
                    (vocab_size + tile_size - 1) // tile_size,
                    fast,
                )
            # Where the table is fed, ``position`` is its ``num_tokens``.
            store_sampled_token(
                token, row_max, logits_row, row, out_ptr, token_ids_ptr, position_ptr, token_stride, vocab_size, append,
                mark_invalid,
            )  # fmt: skip


@triton.jit
def _find_group_bound(group_max, top_k, max_logit):
    """A value that ``top_k`` of ``group_max`` reach and few more do, or minus infinity where there are fewer groups.

    By bisection between the least and the largest: a handful of reductions over registers in place of a sort. It may
    stop early, at 1/8 more groups than k or after 24 turns: the bound stays a lower bound, with a few more candidates.
    """
    low = tl.min(tl.where(group_max > float("-inf"), group_max, max_logit), axis=0)
    high = max_logit
    num_reached = tl.sum((group_max >= low).to(tl.int32), axis=0)
    low = tl.where(num_reached < top_k, float("-inf"), low)
    turn = tl.full((), 0, tl.int32)
    while (turn < 24) & (num_reached > top_k + top_k // 8):
        middle = low + (high - low) * 0.5
        num_at_middle = tl.sum((group_max >= middle).to(tl.int32), axis=0)
        enough = num_at_middle >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        num_reached = tl.where(enough, num_at_middle, num_reached)
        turn += 1
    return low


@triton.jit
def _gather_candidates(
    row_ptr, inv_temperature, bound, group_max, candidate_group_ptr, candidate_logit_ptr, candidate_token_ptr,
    vocab_size: tl.constexpr, groups_per_chunk: tl.constexpr, group_size: tl.constexpr,
    num_groups_block: tl.constexpr, max_candidates: tl.constexpr,
):  # fmt: skip
    """Write tokens of ``bound`` or more, by id, with their logits. Returns how many there are, the first
    ``max_candidates`` of which were written."""
    # A token of ``bound`` or more is in a group whose best is: only those groups are read. Prefix sums give each its
    # place in the list, so the order is that of the ids whatever the threads do.
    chosen = ((group_max >= bound) & (group_max > float("-inf"))).to(tl.int32)
    order = tl.cumsum(chosen, axis=0) - 1
    tl.store(candidate_group_ptr + order, tl.arange(0, num_groups_block), mask=chosen > 0)
    tl.debug_barrier()  # other threads of this program read what these wrote
    num_chosen = tl.sum(chosen, axis=0)
    count = tl.full((), 0, tl.int32)
    for first in range(0, num_chosen, groups_per_chunk):
        index = first + tl.arange(0, groups_per_chunk)
        group = tl.load(candidate_group_ptr + index, mask=index < num_chosen, other=num_groups_block)
        tokens = group[:, None] * group_size + tl.arange(0, group_size)[None, :]
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32) * inv_temperature
        is_candidate = ((x >= bound) & (x > float("-inf"))).to(tl.int32)
        num_in_group = tl.sum(is_candidate, axis=1)
        start = count + tl.cumsum(num_in_group, axis=0) - num_in_group
        place = start[:, None] + tl.cumsum(is_candidate, axis=1) - 1
        fits = (is_candidate > 0) & (place < max_candidates)
        tl.store(candidate_logit_ptr + place, x, mask=fits)
        tl.store(candidate_token_ptr + place, tokens, mask=fits)
        count += tl.sum(num_in_group, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _sample_candidates(
    candidate_logit_ptr, candidate_token_ptr, candidate_mass_ptr, count, top_k, top_p, seed, position, max_logit,
    vocab_size: tl.constexpr, max_candidates: tl.constexpr, block: tl.constexpr, other_block: tl.constexpr,
    fast: tl.constexpr,
):  # fmt: skip
    """The token of a list to which min-p was applied: each is compared with each, for its rank and the mass above."""
    kth_logit = tl.full((), float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, count, block):
        index = first + tl.arange(0, block)
        x = tl.load(candidate_logit_ptr + index, mask=index < count, other=float("-inf"))
        rank = tl.zeros((block,), tl.int32)
        mass_above = tl.zeros((block,), tl.float32)
        for start in range(0, count, other_block):
            other = start + tl.arange(0, other_block)
            y = tl.load(candidate_logit_ptr + other, mask=other < count, other=float("-inf"))
            higher = y[None, :] > x[:, None]
            rank += tl.sum(higher.to(tl.int32), axis=1)
            mass_above += tl.sum(tl.where(higher, device_exp(y - max_logit, fast)[None, :], 0.0), axis=1)
        tl.store(candidate_mass_ptr + index, mass_above, mask=index < count)
        in_top_k = (index < count) & (rank < top_k)  # ties with the k-th have its rank, and stay
        kth_logit = tl.minimum(kth_logit, tl.min(tl.where(in_top_k, x, float("inf")), axis=0))
        total += tl.sum(tl.where(in_top_k, device_exp(x - max_logit, fast), 0.0), axis=0)
    tl.debug_barrier()
    index = tl.arange(0, max_candidates)
    x = tl.load(candidate_logit_ptr + index, mask=index < count, other=float("-inf"))
    mass_above = tl.load(candidate_mass_ptr + index, mask=index < count, other=float("inf"))
    tokens = tl.load(candidate_token_ptr + index, mask=index < count, other=vocab_size)
    # top-p is a share of what min-p and top-k left; the best token has no mass above it and always stays.
    mass_limit = tl.where(top_p < 1.0, top_p * total, float("inf"))
    allowed = (index < count) & (x >= kth_logit) & ((mass_above < mass_limit) | (mass_above <= 0.0))
    noised = tl.where(allowed, x + device_gumbel(seed, position, tokens, fast), float("-inf"))
    best = tl.max(noised, axis=0)
    return tl.min(tl.where(allowed & (noised == best), tokens, vocab_size), axis=0)
