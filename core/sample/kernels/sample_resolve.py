"""Second pass of a random draw: is the pick allowed, and if not, which token is.

**Why the result is the argmax of the noised logits over the allowed tokens.** Each filter keeps the tokens at or above
some logit: min-p by its definition, top-k because ties with the k-th stay, top-p because a token stays if the mass
strictly above its logit is less than p. So the allowed set A is all x >= theta, for a theta that need not be known. Let
C be a set x > v (at first the whole row) that contains A, and b the best noised token of C.

- If b is in A, no token of A, being one of C, beats it: b is the answer.
- If not, x_b < theta, so every token with x <= x_b is out, and {x > x_b} contains A: go on with v = x_b.

v rises with each turn, and the best logit is always in A, so this ends: after one turn with a probability of at least
p, and after about ln(1 / mass of A) in general. Nothing is drawn anew, the noise being a function of (seed, position,
token), so the token is the one that sorting and masking would give.

The first turn's mass is summed by ``parts`` programs; the one that arrives last decides and takes what turns remain.
A turn needs no pass over the row to find the next pick: the first pass left each chunk's best, which stays the chunk's
best while it is above v and bounds the chunk when it is not, so only chunks that could still win are read again,
one or two. And the mass above the likeliest next pick is summed beside the first one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.row import best_noised_of_chunk, sum_masses
from quire.core.sample.kernels.token_feedback import store_sampled_token

__all__ = ["sample_resolve_kernel"]


@triton.jit(do_not_specialize=["padding_row"])
def sample_resolve_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    chunk_best_ptr,
    chunk_logit_ptr,
    chunk_token_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    above_ptr,
    higher_ptr,
    kept_ptr,
    counter_ptr,
    out_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    stride,
    token_stride,
    padding_row,
    vocab: tl.constexpr,
    splits: tl.constexpr,
    splits_block: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    parts: tl.constexpr,
    feed: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (parts, n). Rows with a top-k are another kernel's."""
    part = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    row = line
    if feed:
        row = tl.load(rows_ptr + line)
    if not feed or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        alone = (temperature <= 0.0) | (top_p >= 1.0)
        if ((temperature <= 0.0) | (top_k <= 0)) & ((part == 0) | (not alone)):
            place = tl.arange(0, splits_block)
            inside = place < splits
            start = line * splits
            bests = tl.load(chunk_best_ptr + start + place, mask=inside, other=float("-inf"))
            tokens = tl.load(chunk_token_ptr + start + place, mask=inside, other=vocab)
            best = tl.max(bests, axis=0)
            token = tl.min(tl.where(bests == best, tokens, vocab), axis=0)
            if temperature <= 0.0:
                store_sampled_token(token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed)
            else:
                scale = 1.0 / temperature
                logits = tl.load(chunk_logit_ptr + start + place, mask=inside, other=float("-inf"))
                logit = tl.max(tl.where(tokens == token, logits, float("-inf")), axis=0)
                peaks = tl.load(chunk_max_ptr + start + place, mask=inside, other=float("-inf"))
                largest = tl.maximum(tl.max(peaks, axis=0), -1e30)
                min_p = tl.load(min_p_ptr + row)
                lowest = tl.where(min_p > 0.0, largest + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
                row_ptr = logits_ptr + line * stride
                _, next_logit, next_token = _best_chunk_pick(bests, logits, tokens, lowest, logit, vocab)
                above = tl.full((), 0.0, tl.float32)
                higher = tl.full((), 0.0, tl.float32)
                enough = tl.full((), float("inf"), tl.float32)
                mine = part == 0
                if not alone:
                    each: tl.constexpr = (splits + parts - 1) // parts
                    mass, more, kept = sum_masses(
                        row_ptr, scale, lowest, logit, next_logit, largest, part * each,
                        tl.minimum(part * each + each, splits), vocab, chunk, fast,
                    )  # fmt: skip
                    tl.store(above_ptr + line * parts + part, mass)
                    tl.store(higher_ptr + line * parts + part, more)
                    tl.store(kept_ptr + line * parts + part, kept)
                    tl.debug_barrier()
                    mine = tl.atomic_add(counter_ptr + line, 1, sem="acq_rel") == parts - 1
                    if mine:
                        each_part = line * parts + tl.arange(0, parts)
                        above = tl.sum(tl.load(above_ptr + each_part, cache_modifier=".cg"), axis=0)
                        higher = tl.sum(tl.load(higher_ptr + each_part, cache_modifier=".cg"), axis=0)
                        enough = top_p * tl.sum(tl.load(kept_ptr + each_part, cache_modifier=".cg"), axis=0)
                        tl.store(counter_ptr + line, 0)
                if mine:
                    seed = tl.load(seed_ptr + row)
                    position = tl.load(position_ptr + row)
                    again = (logit < lowest) | ((above >= enough) & (above > 0.0))
                    while again:
                        logit, token = _next_pick(
                            row_ptr, bests, logits, tokens, scale, lowest, logit, seed, position,
                            vocab, splits_block, chunk, tile, fast,
                        )  # fmt: skip
                        if not alone:
                            if token == next_token:
                                above = higher
                            else:
                                above, _, _ = sum_masses(
                                    row_ptr, scale, lowest, logit, logit, largest, 0, splits, vocab, chunk, fast
                                )
                        again = (token < vocab) & (above >= enough) & (above > 0.0)
                    store_sampled_token(
                        token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed
                    )


@triton.jit
def _best_chunk_pick(bests, logits, tokens, lowest, pivot, vocab: tl.constexpr):
    """Of the chunks' picks those with x > pivot and x >= lowest: the best one's noised value, logit and id."""
    known = (logits > pivot) & (logits >= lowest)
    best = tl.max(tl.where(known, bests, float("-inf")), axis=0)
    token = tl.min(tl.where(known & (bests == best), tokens, vocab), axis=0)
    return best, tl.max(tl.where(tokens == token, logits, float("-inf")), axis=0), token


@triton.jit
def _next_pick(
    row_ptr, bests, logits, tokens, scale, lowest, pivot, seed, position,
    vocab: tl.constexpr, splits_block: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The best noised token of the row with x > pivot and x >= lowest: its logit and id."""
    best, logit, token = _best_chunk_pick(bests, logits, tokens, lowest, pivot, vocab)
    known = (logits > pivot) & (logits >= lowest)
    bounds = tl.where(known, float("-inf"), bests)
    bound = tl.max(bounds, axis=0)
    while bound > best:
        place = tl.arange(0, splits_block)
        index = tl.min(tl.where(bounds == bound, place, splits_block), axis=0)
        pieces: tl.constexpr = chunk // tile
        for piece in range(pieces):
            best, logit, token = best_noised_of_chunk(
                row_ptr, index * pieces + piece, scale, lowest, pivot, seed, position, best, logit, token,
                vocab, tile, fast,
            )  # fmt: skip
        bounds = tl.where(place == index, float("-inf"), bounds)
        bound = tl.max(bounds, axis=0)
    return logit, token
