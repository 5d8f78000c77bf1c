"""Second pass of sampling without top-k: is the pick allowed, and if not, which token is.

**Why the result is the argmax of the noised logits over the allowed tokens.** Each filter keeps the tokens at or above
some logit: min-p by its definition, top-k because ties with the k-th stay, top-p because a token stays if the mass
strictly above its logit is less than p. So the allowed set A is all x >= theta, for a theta that need not be known. Let
C be a set x > v (at first the whole row) that contains A, and b the best noised token of C.

- If b is in A, no token of A, being one of C, beats it: b is the answer.
- If not, x_b < theta, so every token with x <= x_b is out, and {x > x_b} contains A: go on with v = x_b, the pivot.

v rises with each turn, and the best logit is always in A, so this ends: after one turn with a probability of at least
p, and after about ln(1 / mass of A) in general. No noise is generated anew, it being a function of (seed, position,
token), so the token is the one that sorting and masking would give. FlashInfer's sorting-free sampling moves a pivot in
the same way, but samples anew each time (https://flashinfer.ai/2025/03/10/sampling.html).

The first turn's mass is summed by ``num_parts`` programs; the one that arrives last decides and takes what turns
remain. A turn needs no pass over the row to find the next pick: the first pass left each chunk's best, which stays the
chunk's best while it is above v and bounds the chunk when it is not, so only chunks that could still win are read
again, one or two. And the mass above the likeliest next pick is summed beside the first one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.sample_row import best_noised_of_chunk, max_or_nan, store_sampled_token, sum_masses

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
    chunk_noised_ptr,
    chunk_logit_ptr,
    chunk_token_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    part_above_ptr,
    part_above_next_ptr,
    part_kept_ptr,
    num_arrived_ptr,
    out_ptr,
    token_ids_ptr,
    stride,
    token_stride,
    padding_row,
    vocab_size: tl.constexpr,
    num_chunks: tl.constexpr,
    tile_size: tl.constexpr,
    num_chunks_block: tl.constexpr,
    chunk_size: tl.constexpr,
    num_parts: tl.constexpr,
    append: tl.constexpr,
    mark_invalid: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (num_parts, n). Rows with a top-k are ``sample_topk_candidates``'s."""
    part = tl.program_id(0)
    logits_row = tl.program_id(1).to(tl.int64)
    row = logits_row
    if append:
        row = tl.load(rows_ptr + logits_row)
    if not append or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        # Without top-p there is no mass to sum, and the first part does all that is left.
        first_part_only = (temperature <= 0.0) | (top_p >= 1.0)
        if ((temperature <= 0.0) | (top_k <= 0)) & ((part == 0) | (not first_part_only)):
            chunks = tl.arange(0, num_chunks_block)
            inside = chunks < num_chunks
            start = logits_row * num_chunks
            bests = tl.load(chunk_noised_ptr + start + chunks, mask=inside, other=float("-inf"))
            tokens = tl.load(chunk_token_ptr + start + chunks, mask=inside, other=vocab_size)
            best = max_or_nan(bests, 0, fast)  # noise leaves NaN out: only of a greedy row it is one
            token = tl.min(tl.where(bests == best, tokens, vocab_size), axis=0)
            # Where the table is fed, ``position`` is its ``num_tokens``.
            if temperature <= 0.0:
                store_sampled_token(
                    token, best, logits_row, row, out_ptr, token_ids_ptr, position_ptr, token_stride, vocab_size,
                    append, mark_invalid,
                )  # fmt: skip
            else:
                inv_temperature = 1.0 / temperature
                logits = tl.load(chunk_logit_ptr + start + chunks, mask=inside, other=float("-inf"))
                logit = tl.max(tl.where(tokens == token, logits, float("-inf")), axis=0)
                chunk_max = tl.load(chunk_max_ptr + start + chunks, mask=inside, other=float("-inf"))
                row_max = max_or_nan(chunk_max, 0, fast)
                max_logit = tl.maximum(row_max, -1e30)  # finite, also where the whole row is masked
                min_p = tl.load(min_p_ptr + row)
                # p >= min_p * p_max  <=>  logit >= max_logit + log(min_p): min-p needs no softmax.
                min_logit = tl.where(min_p > 0.0, max_logit + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
                row_ptr = logits_ptr + logits_row * stride
                _, next_logit, next_token = _best_chunk_pick(bests, logits, tokens, min_logit, logit, vocab_size)
                above = tl.full((), 0.0, tl.float32)
                above_next = tl.full((), 0.0, tl.float32)
                mass_limit = tl.full((), float("inf"), tl.float32)
                decides = part == 0
                if not first_part_only:
                    chunks_per_part: tl.constexpr = (num_chunks + num_parts - 1) // num_parts
                    part_above, part_above_next, part_kept = sum_masses(
                        row_ptr, inv_temperature, min_logit, logit, next_logit, max_logit, part * chunks_per_part,
                        tl.minimum(part * chunks_per_part + chunks_per_part, num_chunks), vocab_size, chunk_size, fast,
                    )  # fmt: skip
                    tl.store(part_above_ptr + logits_row * num_parts + part, part_above)
                    tl.store(part_above_next_ptr + logits_row * num_parts + part, part_above_next)
                    tl.store(part_kept_ptr + logits_row * num_parts + part, part_kept)
                    # As in ``argmax_kernel``: publish, and the last to arrive reads what the others published. The sums
                    # are added in the order of the parts, so the order of arrival changes no bit.
                    tl.debug_barrier()
                    decides = tl.atomic_add(num_arrived_ptr + logits_row, 1, sem="acq_rel") == num_parts - 1
                    if decides:
                        parts = logits_row * num_parts + tl.arange(0, num_parts)
                        above = tl.sum(tl.load(part_above_ptr + parts, cache_modifier=".cg"), axis=0)
                        above_next = tl.sum(tl.load(part_above_next_ptr + parts, cache_modifier=".cg"), axis=0)
                        mass_limit = top_p * tl.sum(tl.load(part_kept_ptr + parts, cache_modifier=".cg"), axis=0)
                        tl.store(num_arrived_ptr + logits_row, 0)  # ready for the next launch
                if decides:
                    seed = tl.load(seed_ptr + row)
                    position = tl.load(position_ptr + row)
                    # ``above > 0`` keeps the best logit in A, whatever p is rounded to.
                    refused = (logit < min_logit) | ((above >= mass_limit) & (above > 0.0))
                    while refused:
                        logit, token = _next_pick(
                            row_ptr, bests, logits, tokens, inv_temperature, min_logit, logit, seed, position,
                            vocab_size, num_chunks_block, chunk_size, tile_size, fast,
                        )  # fmt: skip
                        if not first_part_only:
                            if token == next_token:
                                above = above_next  # summed beside the first pick's
                            else:
                                above, _, _ = sum_masses(
                                    row_ptr, inv_temperature, min_logit, logit, logit, max_logit, 0, num_chunks,
                                    vocab_size, chunk_size, fast,
                                )  # fmt: skip
                        refused = (token < vocab_size) & (above >= mass_limit) & (above > 0.0)
                    store_sampled_token(
                        token, row_max, logits_row, row, out_ptr, token_ids_ptr, position_ptr, token_stride,
                        vocab_size, append, mark_invalid,
                    )  # fmt: skip


@triton.jit
def _best_chunk_pick(bests, logits, tokens, min_logit, pivot, vocab_size: tl.constexpr):
    """Of the chunks' picks those with x > pivot and x >= min_logit: the best one's noised value, logit and id."""
    known = (logits > pivot) & (logits >= min_logit)
    best = tl.max(tl.where(known, bests, float("-inf")), axis=0)
    token = tl.min(tl.where(known & (bests == best), tokens, vocab_size), axis=0)
    return best, tl.max(tl.where(tokens == token, logits, float("-inf")), axis=0), token


@triton.jit
def _next_pick(
    row_ptr, bests, logits, tokens, inv_temperature, min_logit, pivot, seed, position,
    vocab_size: tl.constexpr, num_chunks_block: tl.constexpr, chunk_size: tl.constexpr, tile_size: tl.constexpr,
    fast: tl.constexpr,
):  # fmt: skip
    """The best noised token of the row with x > pivot and x >= min_logit: its logit and id."""
    best, logit, token = _best_chunk_pick(bests, logits, tokens, min_logit, pivot, vocab_size)
    # A chunk whose own pick is out may have another token that wins, of a noised value below its pick's. Such chunks
    # are read again, the most promising first, until none can beat the best that is known.
    known = (logits > pivot) & (logits >= min_logit)
    bounds = tl.where(known, float("-inf"), bests)
    bound = tl.max(bounds, axis=0)
    while bound > best:
        chunks = tl.arange(0, num_chunks_block)
        index = tl.min(tl.where(bounds == bound, chunks, num_chunks_block), axis=0)
        tiles_per_chunk: tl.constexpr = chunk_size // tile_size
        for tile in range(tiles_per_chunk):
            best, logit, token = best_noised_of_chunk(
                row_ptr, index * tiles_per_chunk + tile, inv_temperature, min_logit, pivot, seed, position, best, logit,
                token, vocab_size, tile_size, fast,
            )  # fmt: skip
        bounds = tl.where(chunks == index, float("-inf"), bounds)
        bound = tl.max(bounds, axis=0)
    return logit, token
