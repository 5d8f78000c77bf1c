"""Penalties that touch only the tokens a request has seen, however large the vocabulary.

Two launches over the tokens of the penalized requests: the first counts each token, the second changes its logit. One
launch would not do: a token may be counted by several programs before any of them may use the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.sample.inputs import PenaltyColumns

__all__ = ["launch_penalties"]

_BLOCK = 512
"""Tokens of a sequence that a program takes."""
_PROMPT_BIT = tl.constexpr(1 << 30)
"""Set in the count of a token that is in the prompt; the bits below it count how often it was generated."""


def launch_penalties(
    logits: Tensor, logits_rows: Tensor, rows: Tensor, num_tokens: Tensor, max_num_tokens: int, columns: PenaltyColumns
) -> None:
    """As ``quire.core.sample.penalties.apply_penalties``. Takes 4 * vocab bytes a penalized row while it runs."""
    vocab_size = logits.shape[1]
    counts = torch.zeros(len(logits_rows), vocab_size, dtype=torch.int32, device=logits.device)
    grid = (triton.cdiv(max_num_tokens, _BLOCK), len(logits_rows))
    token_ids, prompt_len, repetition, frequency, presence = columns
    shared = (counts, logits_rows, rows, num_tokens, token_ids, prompt_len, token_ids.stride(0))
    count_tokens_kernel[grid](*shared, vocab_size=vocab_size, block=_BLOCK, num_warps=4)
    penalties_kernel[grid](
        *shared, logits, repetition, frequency, presence, logits.stride(0),
        vocab_size=vocab_size, block=_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _load_tokens(
    counts_ptr, logits_rows_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab_size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """A block of a request's tokens: logits row, table row, positions, addresses of their counts, ids, which are real.

    Ids beyond the vocabulary are left out: a draft not yet verified, or padding, must not index with one.
    """
    index = tl.program_id(1).to(tl.int64)
    logits_row = tl.load(logits_rows_ptr + index)
    row = tl.load(rows_ptr + logits_row)
    position = tl.program_id(0) * block + tl.arange(0, block)
    real = position < tl.load(num_tokens_ptr + logits_row)
    token = tl.load(token_ids_ptr + row * token_stride + position, mask=real, other=0)
    real = real & (token >= 0) & (token < vocab_size)
    return logits_row, row, position, counts_ptr + index * vocab_size + token, token, real


@triton.jit(do_not_specialize=["token_stride"])
def count_tokens_kernel(
    counts_ptr, logits_rows_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, prompt_len_ptr, token_stride,
    vocab_size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """How often each token was generated, and a high bit for those of the prompt."""
    _, row, position, count_ptr, _, real = _load_tokens(
        counts_ptr, logits_rows_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab_size, block
    )
    prompt_len = tl.load(prompt_len_ptr + row)
    bit = tl.full((block,), _PROMPT_BIT, tl.int32)
    tl.atomic_or(count_ptr, bit, mask=real & (position < prompt_len), sem="relaxed")
    one = tl.full((block,), 1, tl.int32)
    tl.atomic_add(count_ptr, one, mask=real & (position >= prompt_len), sem="relaxed")


@triton.jit(do_not_specialize=["token_stride", "stride"])
def penalties_kernel(
    counts_ptr, logits_rows_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, prompt_len_ptr, token_stride,
    logits_ptr, repetition_ptr, frequency_ptr, presence_ptr, stride,
    vocab_size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Change the logit of every token that has a count.

    A token may stand at many positions, and its logit must change once: the lane that exchanges its count for zero does
    it, the others find nothing. All would do the same, so it does not matter which lane that is.
    """
    logits_row, row, _, count_ptr, token, real = _load_tokens(
        counts_ptr, logits_rows_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab_size, block
    )
    zero = tl.full((block,), 0, tl.int32)
    count = tl.where(real, tl.atomic_xchg(count_ptr, zero, mask=real, sem="relaxed"), 0)
    took_count = count != 0
    num_generated = (count & (_PROMPT_BIT - 1)).to(tl.float32)
    logit_ptr = logits_ptr + logits_row * stride + token
    x = tl.load(logit_ptr, mask=took_count, other=0.0)
    factor = tl.load(repetition_ptr + row)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.load(frequency_ptr + row) * num_generated
    x -= tl.where(num_generated > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(logit_ptr, x, mask=took_count)
