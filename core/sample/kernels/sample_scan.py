"""First pass of a random draw: every row is read once.

What a chunk of a row leaves behind depends on what the row asks for, read on the device:

- greedy: its best token;
- top-k of at most ``most_k``: the best logit of each group. No noise: few tokens will need any;
- anything else: the best noised token with its logit, the largest logit, the sum of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel

__all__ = ["sample_scan_kernel"]


@triton.jit(do_not_specialize=["padding_row"])
def sample_scan_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    seed_ptr,
    position_ptr,
    chunk_best_ptr,
    chunk_logit_ptr,
    chunk_token_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    group_max_ptr,
    stride,
    padding_row,
    vocab: tl.constexpr,
    splits: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    feed: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (splits, n): a program takes one chunk of one row."""
    split = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    row = line
    if feed:
        row = tl.load(rows_ptr + line)
    if not feed or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        group = tl.arange(0, groups)[:, None]
        first = split * (groups * width)
        at = first + group * width + tl.arange(0, width)[None, :]
        row_ptr = logits_ptr + line * stride
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        place = line * splits + split
        if temperature <= 0.0:
            best = tl.max(x)
            tl.store(chunk_best_ptr + place, best)
            tl.store(chunk_token_ptr + place, tl.min(tl.where(x == best, at, vocab)))
        else:
            scale = 1.0 / temperature
            peaks = tl.max(x, axis=1) * scale
            largest = tl.max(peaks, axis=0)
            tl.store(chunk_max_ptr + place, largest)
            if top_k > 0:
                tl.store(group_max_ptr + place * groups + tl.arange(0, groups), peaks)
            else:
                best, token, total = _noised_max(
                    row_ptr, first, scale, tl.maximum(largest, -1e30), tl.load(seed_ptr + row),
                    tl.load(position_ptr + row), vocab, groups * width, tile, fast,
                )  # fmt: skip
                tl.store(chunk_best_ptr + place, best)
                tl.store(chunk_token_ptr + place, token)
                logit = tl.load(row_ptr + tl.minimum(token, vocab - 1)).to(tl.float32) * scale
                tl.store(chunk_logit_ptr + place, logit)
                tl.store(chunk_sum_ptr + place, total)


@triton.jit
def _noised_max(
    row_ptr, first, scale, reference, seed, position,
    vocab: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the best noised value, its token, and the sum of exp(x - reference)."""
    bests = tl.full((tile,), float("-inf"), tl.float32)
    tokens = tl.full((tile,), vocab, tl.int32)
    sums = tl.zeros((tile,), tl.float32)
    for start in range(0, chunk, tile):
        at = first + start + tl.arange(0, tile)
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * scale
        sums += device_exp(x - reference, fast)
        noised = x + device_gumbel(seed, position, at, fast)
        better = noised > bests
        tokens = tl.where(better, at, tokens)
        bests = tl.where(better, noised, bests)
    best = tl.max(bests, axis=0)
    return best, tl.min(tl.where(bests == best, tokens, vocab), axis=0), tl.sum(sums, axis=0)
