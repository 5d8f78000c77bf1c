"""End of a random draw without top-k: is the pick allowed, and if not, which token is.

**Why the result is the argmax of the noised logits over the allowed tokens.** Each filter keeps the tokens at or above
some logit: min-p by its definition, top-k because ties with the k-th stay, top-p because a token stays if the mass
strictly above its logit is less than p. So the allowed set A is all x >= theta, for a theta that need not be known. Let
C be a set x > v (at first the whole row) that contains A, and b the best noised token of C.

- If b is in A, no token of A, being one of C, beats it: b is the answer.
- If not, x_b < theta, so every token with x <= x_b is out, and {x > x_b} contains A: go on with v = x_b.

v rises with each turn, and the best logit is always in A, so this ends: after one turn with a probability of at least
p, and after about ln(1 / mass of A) in general. Nothing is drawn anew, the noise being a function of (seed, position,
token), so the token is the one that sorting and masking would give.

The first turn's mass was summed by ``weigh``, a kernel of its own that fills the GPU; what turns remain, one program
takes. A turn needs no pass over the row to find the next pick: the first pass left each chunk's best, which stays the
chunk's best while it is above v and bounds the chunk when it is not, so only chunks that could still win are read
again, one or two. And ``weigh`` summed the mass above the likeliest next pick too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.feedback import emit
from quire.core.sample.kernels.row import best_known, best_of_chunk, masses, min_p_floor

__all__ = ["settle_kernel"]


@triton.jit(do_not_specialize=["padding_row"])
def settle_kernel(
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
    above_ptr,
    higher_ptr,
    kept_ptr,
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
    """Grid (n,). Rows with a top-k are another kernel's."""
    line = tl.program_id(0).to(tl.int64)
    row = line
    if feed:
        row = tl.load(rows_ptr + line)
    if not feed or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        if (temperature <= 0.0) | (top_k <= 0):
            place = tl.arange(0, splits_block)
            inside = place < splits
            start = line * splits
            bests = tl.load(chunk_best_ptr + start + place, mask=inside, other=float("-inf"))
            tokens = tl.load(chunk_token_ptr + start + place, mask=inside, other=vocab)
            best = tl.max(bests, axis=0)
            token = tl.min(tl.where(bests == best, tokens, vocab), axis=0)
            if temperature <= 0.0:
                emit(token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed)
            else:
                scale = 1.0 / temperature
                row_ptr = logits_ptr + line * stride
                logits = tl.load(chunk_logit_ptr + start + place, mask=inside, other=float("-inf"))
                logit = tl.max(tl.where(tokens == token, logits, float("-inf")), axis=0)
                peaks = tl.load(chunk_max_ptr + start + place, mask=inside, other=float("-inf"))
                largest = tl.maximum(tl.max(peaks, axis=0), -1e30)
                lowest = min_p_floor(tl.load(min_p_ptr + row), largest)
                _, _, next_token = best_known(bests, logits, tokens, lowest, logit, vocab)
                weighed = top_p < 1.0
                each = line * parts + tl.arange(0, parts)
                above = tl.sum(tl.load(above_ptr + each, mask=weighed, other=0.0), axis=0)
                higher = tl.sum(tl.load(higher_ptr + each, mask=weighed, other=0.0), axis=0)
                kept = tl.sum(tl.load(kept_ptr + each, mask=weighed, other=0.0), axis=0)
                enough = tl.where(weighed, top_p * kept, float("inf"))
                seed = tl.load(seed_ptr + row)
                position = tl.load(position_ptr + row)
                again = (logit < lowest) | ((above >= enough) & (above > 0.0))
                while again:
                    logit, token = _next_pick(
                        row_ptr, bests, logits, tokens, scale, lowest, logit, seed, position,
                        vocab, splits_block, chunk, tile, fast,
                    )  # fmt: skip
                    above = higher
                    if weighed & (token != next_token):
                        above, _, _ = masses(
                            row_ptr, scale, lowest, logit, logit, largest, 0, splits, vocab, chunk, fast
                        )
                    again = (token < vocab) & (above >= enough) & (above > 0.0)
                emit(token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed)


@triton.jit
def _next_pick(
    row_ptr, bests, logits, tokens, scale, lowest, pivot, seed, position,
    vocab: tl.constexpr, splits_block: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The best noised token of the row with x > pivot and x >= lowest: its logit and id."""
    best, logit, token = best_known(bests, logits, tokens, lowest, pivot, vocab)
    known = (logits > pivot) & (logits >= lowest)
    bounds = tl.where(known, float("-inf"), bests)
    bound = tl.max(bounds, axis=0)
    while bound > best:
        place = tl.arange(0, splits_block)
        index = tl.min(tl.where(bounds == bound, place, splits_block), axis=0)
        pieces: tl.constexpr = chunk // tile
        for piece in range(pieces):
            best, logit, token = best_of_chunk(
                row_ptr, index * pieces + piece, scale, lowest, pivot, seed, position, best, logit, token,
                vocab, tile, fast,
            )  # fmt: skip
        bounds = tl.where(place == index, float("-inf"), bounds)
        bound = tl.max(bounds, axis=0)
    return logit, token
