"""Device functions of the sampling kernels: passes of one program over a row of logits, and the end of every kernel.

In all of them ``inv_temperature`` scales the logits when they are loaded: they stay in the model's dtype in memory, and
a float32 copy of a batch (256 rows of 151,936 tokens: 156 MB) is never written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel

__all__ = [
    "best_noised_of_chunk",
    "count_at_least",
    "load_chunk",
    "max_or_nan",
    "sample_whole_row",
    "store_sampled_token",
    "sum_masses",
]


@triton.jit
def load_chunk(logits_ptr, index, inv_temperature, vocab_size: tl.constexpr, chunk_size: tl.constexpr):
    """Tokens of chunk ``index`` of a row and their logits over temperature, minus infinity past the end."""
    tokens = index * chunk_size + tl.arange(0, chunk_size)
    x = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32) * inv_temperature
    return tokens, x


@triton.jit
def max_or_nan(x, axis: tl.constexpr, fast: tl.constexpr):
    """The largest of ``x`` along ``axis``, or NaN where one of them is: hardware has an instruction for it, so that a
    wrong model is noticed for nothing."""
    if fast:
        return tl.reduce(x, axis, _larger_or_nan)
    # The interpreter would run the function above for each element.
    has_nan = tl.max((x != x).to(tl.int32), axis=axis) > 0
    return tl.where(has_nan, float("nan"), tl.max(x, axis=axis))


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def count_at_least(
    logits_ptr, inv_temperature, min_logit, vocab_size: tl.constexpr, chunk_size: tl.constexpr, num_chunks: tl.constexpr
):
    """How many tokens have ``min_logit`` or more."""
    counts = tl.zeros((chunk_size,), dtype=tl.int32)
    for index in range(num_chunks):
        _, x = load_chunk(logits_ptr, index, inv_temperature, vocab_size, chunk_size)
        counts += (x >= min_logit).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def sum_masses(
    logits_ptr, inv_temperature, min_logit, pivot, next_pivot, max_logit, first_chunk, end_chunk,
    vocab_size: tl.constexpr, chunk_size: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Of chunks ``first_chunk`` to ``end_chunk``: the sums of exp(x - max_logit) over x > pivot, x > next_pivot and
    x >= min_logit. Each lane sums its own column first: the order of the sum never depends on the batch."""
    above = tl.zeros((chunk_size,), dtype=tl.float32)
    above_next = tl.zeros((chunk_size,), dtype=tl.float32)
    kept = tl.zeros((chunk_size,), dtype=tl.float32)
    for index in range(first_chunk, end_chunk):
        _, x = load_chunk(logits_ptr, index, inv_temperature, vocab_size, chunk_size)
        weight = device_exp(x - max_logit, fast)
        above += tl.where(x > pivot, weight, 0.0)
        above_next += tl.where(x > next_pivot, weight, 0.0)
        kept += tl.where(x >= min_logit, weight, 0.0)
    return tl.sum(above, axis=0), tl.sum(above_next, axis=0), tl.sum(kept, axis=0)


@triton.jit
def best_noised_of_chunk(
    logits_ptr, index, inv_temperature, min_logit, pivot, seed, position, best, logit, token,
    vocab_size: tl.constexpr, chunk_size: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The best noised token so far (value, logit, id) against those of a chunk with x > pivot and x >= min_logit."""
    tokens, x = load_chunk(logits_ptr, index, inv_temperature, vocab_size, chunk_size)
    allowed = (x > pivot) & (x >= min_logit)
    if tl.max(allowed.to(tl.int32), axis=0) > 0:  # noise costs more than the load: most chunks need none
        noised = tl.where(allowed, x + device_gumbel(seed, position, tokens, fast), float("-inf"))
        chunk_best = tl.max(noised, axis=0)
        chunk_token = tl.min(tl.where(noised == chunk_best, tokens, vocab_size), axis=0)
        if (chunk_best > best) | ((chunk_best == best) & (chunk_token < token)):
            best = chunk_best
            token = chunk_token
            # Loading it again is cheaper than a reduction over x; the clamp is for rows of NaN.
            logit = tl.load(logits_ptr + tl.minimum(chunk_token, vocab_size - 1)).to(tl.float32) * inv_temperature
    return best, logit, token


@triton.jit
def sample_whole_row(
    row_ptr, inv_temperature, min_logit, top_k, top_p, seed, position, max_logit,
    vocab_size: tl.constexpr, chunk_size: tl.constexpr, num_chunks: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The token of a row with a top-k, reading the row each time: slow, and exact for any k and any number of ties."""
    # Bisection over float32 values as integers of the same order ends after at most 32 turns with the k-th logit itself
    # (or with a value that exactly k tokens reach, which allows the same tokens).
    lowest = tl.maximum(min_logit, -3e38)
    high = _sortable_key(max_logit)
    low = tl.minimum(_sortable_key(lowest), high)
    num_reached = count_at_least(row_ptr, inv_temperature, _float_of_key(low), vocab_size, chunk_size, num_chunks)
    while (low < high) & (num_reached > top_k):
        middle = (low + high + 1) // 2
        num_at_middle = count_at_least(
            row_ptr, inv_temperature, _float_of_key(middle), vocab_size, chunk_size, num_chunks
        )
        enough = num_at_middle >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        num_reached = tl.where(enough, num_at_middle, num_reached)
    min_logit = _float_of_key(low)
    # Pick, check against top-p, and pick again among the logits above the refused one: see ``sample_resolve``.
    pivot = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), vocab_size, tl.int32)
    again = tl.full((), 1, tl.int32)
    while again > 0:
        best = tl.full((), float("-inf"), tl.float32)
        logit = tl.full((), float("-inf"), tl.float32)
        token = tl.full((), vocab_size, tl.int32)
        for index in range(num_chunks):
            best, logit, token = best_noised_of_chunk(
                row_ptr, index, inv_temperature, min_logit, pivot, seed, position, best, logit, token,
                vocab_size, chunk_size, fast,
            )  # fmt: skip
        pivot = logit
        above, _, kept = sum_masses(
            row_ptr, inv_temperature, min_logit, pivot, pivot, max_logit, 0, num_chunks, vocab_size, chunk_size, fast
        )
        refused = (token < vocab_size) & (top_p < 1.0) & (above >= top_p * kept) & (above > 0.0)
        again = refused.to(tl.int32)
    return token


@triton.jit
def store_sampled_token(
    token,
    max_logit,
    logits_row,
    row,
    out_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    token_stride,
    vocab_size: tl.constexpr,
    append: tl.constexpr,
    mark_invalid: tl.constexpr,
):
    """Store ``token`` for ``logits_row``; with ``append`` also at the end of ``row`` of the request table, so that the
    next step, which may be queued already, finds it without the host.

    ``max_logit`` is the row's largest logit, NaN if it has one. With ``mark_invalid`` a row without a number above
    minus infinity stores ``NO_LOGITS``; the table gets a token of the vocabulary all the same."""
    # A row of logits without any number (all NaN) must not send an index out of the vocabulary into the embedding.
    token = tl.minimum(token, vocab_size - 1).to(tl.int32)
    stored = token
    if mark_invalid:
        stored = tl.where(max_logit > float("-inf"), token, -1)  # NO_LOGITS of ``row_faults``
    tl.store(out_ptr + logits_row, stored)
    if append:
        end = tl.load(num_tokens_ptr + row)
        tl.store(token_ids_ptr + row * token_stride + end, token)
        tl.store(num_tokens_ptr + row, end + 1)


@triton.jit
def _sortable_key(x):
    """An int64 that orders as the float32 does: its bits, those below the sign turned over where it is negative."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _float_of_key(key):
    """The float32 of a scalar ``_sortable_key``."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
