"""What a single program does to a whole row, a chunk at a time, where a row needs another look."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel

__all__ = ["best_noised_of_chunk", "count_at_least", "sum_masses"]


@triton.jit
def load_chunk(logits_ptr, index, scale, vocab: tl.constexpr, chunk: tl.constexpr):
    """Tokens of chunk ``index`` of a row and their logits over temperature, minus infinity past the end."""
    at = index * chunk + tl.arange(0, chunk)
    return at, tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * scale


@triton.jit
def count_at_least(logits_ptr, scale, lowest, vocab: tl.constexpr, chunk: tl.constexpr, splits: tl.constexpr):
    """How many tokens have ``lowest`` or more."""
    counts = tl.zeros((chunk,), dtype=tl.int32)
    for index in range(splits):
        _, x = load_chunk(logits_ptr, index, scale, vocab, chunk)
        counts += (x >= lowest).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def sum_masses(
    logits_ptr, scale, lowest, pivot, second, largest, first, last,
    vocab: tl.constexpr, chunk: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Of chunks ``first`` to ``last``: the sums of exp(x - largest) over x > pivot, x > second and x >= lowest."""
    above = tl.zeros((chunk,), dtype=tl.float32)
    higher = tl.zeros((chunk,), dtype=tl.float32)
    kept = tl.zeros((chunk,), dtype=tl.float32)
    for index in range(first, last):
        _, x = load_chunk(logits_ptr, index, scale, vocab, chunk)
        weight = device_exp(x - largest, fast)
        above += tl.where(x > pivot, weight, 0.0)
        higher += tl.where(x > second, weight, 0.0)
        kept += tl.where(x >= lowest, weight, 0.0)
    return tl.sum(above, axis=0), tl.sum(higher, axis=0), tl.sum(kept, axis=0)


@triton.jit
def best_noised_of_chunk(
    logits_ptr, index, scale, lowest, pivot, seed, position, best, logit, token,
    vocab: tl.constexpr, chunk: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """The best noised token so far (value, logit, id) against those of a chunk with x > pivot and x >= lowest."""
    at, x = load_chunk(logits_ptr, index, scale, vocab, chunk)
    allowed = (x > pivot) & (x >= lowest)
    if tl.max(allowed.to(tl.int32), axis=0) > 0:
        noised = tl.where(allowed, x + device_gumbel(seed, position, at, fast), float("-inf"))
        top = tl.max(noised, axis=0)
        found = tl.min(tl.where(noised == top, at, vocab), axis=0)
        if (top > best) | ((top == best) & (found < token)):
            best = top
            token = found
            logit = tl.load(logits_ptr + tl.minimum(found, vocab - 1)).to(tl.float32) * scale
    return best, logit, token
