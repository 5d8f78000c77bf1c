"""First pass of random sampling: every row is read once.

What a chunk of a row leaves behind depends on what the row asks for, read on the device:

- greedy: its best token;
- top-k: the best logit of each group. No noise: few tokens will need any;
- anything else: the best noised token with its logit, the largest logit, the sum of exponentials.

The largest logit of a chunk or group with a NaN is NaN: the passes that follow find it there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.sample.kernels.noise_kernel import device_exp, device_gumbel
from quire.core.sample.kernels.sample_row import max_or_nan

__all__ = ["sample_scan_kernel"]


@triton.jit(do_not_specialize=["padding_row"])
def sample_scan_kernel(
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
    group_max_ptr,
    stride,
    token_stride,
    padding_row,
    vocab_size: tl.constexpr,
    num_chunks: tl.constexpr,
    tile_size: tl.constexpr,
    groups_per_chunk: tl.constexpr,
    group_size: tl.constexpr,
    append: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (num_chunks, n): a program takes one chunk of one row."""
    chunk = tl.program_id(0)
    logits_row = tl.program_id(1).to(tl.int64)  # times the stride it exceeds 32 bits
    row = logits_row
    if append:
        row = tl.load(rows_ptr + logits_row)
    if not append or row != padding_row:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        group = tl.arange(0, groups_per_chunk)[:, None]
        first = chunk * (groups_per_chunk * group_size)
        tokens = first + group * group_size + tl.arange(0, group_size)[None, :]
        row_ptr = logits_ptr + logits_row * stride
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        result = logits_row * num_chunks + chunk
        if temperature <= 0.0:
            best = max_or_nan(max_or_nan(x, 1, fast), 0, fast)
            tl.store(chunk_noised_ptr + result, best)
            tl.store(chunk_token_ptr + result, tl.min(tl.where(x == best, tokens, vocab_size)))
        else:
            inv_temperature = 1.0 / temperature
            group_max = max_or_nan(x, 1, fast) * inv_temperature  # scaling keeps the order: one product a group
            max_logit = max_or_nan(group_max, 0, fast)
            tl.store(chunk_max_ptr + result, max_logit)
            if top_k > 0:
                tl.store(group_max_ptr + result * groups_per_chunk + tl.arange(0, groups_per_chunk), group_max)
            else:
                # A chunk that is masked whole has no maximum to subtract; -1e30 keeps inf - inf, a NaN, out of the sum.
                best, token, total = _noised_max(
                    row_ptr, first, inv_temperature, tl.maximum(max_logit, -1e30), tl.load(seed_ptr + row),
                    tl.load(position_ptr + row), vocab_size, groups_per_chunk * group_size, tile_size, fast,
                )  # fmt: skip
                tl.store(chunk_noised_ptr + result, best)
                tl.store(chunk_token_ptr + result, token)
                logit = tl.load(row_ptr + tl.minimum(token, vocab_size - 1)).to(tl.float32) * inv_temperature
                tl.store(chunk_logit_ptr + result, logit)
                tl.store(chunk_sum_ptr + result, total)


@triton.jit
def _noised_max(
    row_ptr, first, inv_temperature, reference, seed, position,
    vocab_size: tl.constexpr, chunk_size: tl.constexpr, tile_size: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the best noised value, its token, and the sum of exp(x - reference).

    The chunk is read again, from the L1 cache, in tiles that leave registers for the noise. Each lane keeps the best of
    its own column; they meet once, at the end.
    """
    bests = tl.full((tile_size,), float("-inf"), tl.float32)
    best_tokens = tl.full((tile_size,), vocab_size, tl.int32)
    sums = tl.zeros((tile_size,), tl.float32)
    for start in range(0, chunk_size, tile_size):
        tokens = first + start + tl.arange(0, tile_size)
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32) * inv_temperature
        sums += device_exp(x - reference, fast)
        # Gumbel-max: the argmax of x + noise is distributed as the softmax of x. The noise is a function of (seed,
        # position, token), so neither the batch, nor the tiling, nor a second look changes it.
        noised = x + device_gumbel(seed, position, tokens, fast)
        better = noised > bests
        best_tokens = tl.where(better, tokens, best_tokens)
        bests = tl.where(better, noised, bests)
    best = tl.max(bests, axis=0)
    return best, tl.min(tl.where(bests == best, best_tokens, vocab_size), axis=0), tl.sum(sums, axis=0)
