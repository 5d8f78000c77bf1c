"""Penalties that touch only the tokens a request has seen, however large the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_penalties"]

_BLOCK = 512
_PROMPT = tl.constexpr(1 << 30)


def launch_penalties(
    logits: Tensor,
    lines: Tensor,
    rows: Tensor,
    num_tokens: Tensor,
    longest: int,
    token_ids: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """As ``quire.core.sample.penalties.apply_penalties``, on ``lines`` (m,) int64 of ``logits`` (n, vocab) float32.

    ``rows`` (n,) int64 and ``num_tokens`` (n,) int32 are by line, the largest length being ``longest`` or less. The
    others are the request table's columns: ``token_ids`` (rows, length) and ``prompt_len`` (rows,) int32, the penalties
    (rows,) float32. Takes 4 * vocab bytes a line while it runs.
    """
    vocab = logits.shape[1]
    counts = torch.zeros(len(lines), vocab, dtype=torch.int32, device=logits.device)
    grid = (triton.cdiv(longest, _BLOCK), len(lines))
    shared = (counts, lines, rows, num_tokens, token_ids, prompt_len, token_ids.stride(0))
    count_tokens_kernel[grid](*shared, vocab=vocab, block=_BLOCK, num_warps=4)
    penalties_kernel[grid](
        *shared, logits, repetition, frequency, presence, logits.stride(0), vocab=vocab, block=_BLOCK, num_warps=4
    )


@triton.jit
def _seen(
    counts_ptr, lines_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """A block of a line's tokens: line, row, places in the sequence, addresses of their counts, ids, which are real."""
    index = tl.program_id(1).to(tl.int64)
    line = tl.load(lines_ptr + index)
    row = tl.load(rows_ptr + line)
    at = tl.program_id(0) * block + tl.arange(0, block)
    real = at < tl.load(num_tokens_ptr + line)
    token = tl.load(token_ids_ptr + row * token_stride + at, mask=real, other=0)
    real = real & (token >= 0) & (token < vocab)
    return line, row, at, counts_ptr + index * vocab + token, token, real


@triton.jit(do_not_specialize=["token_stride"])
def count_tokens_kernel(
    counts_ptr, lines_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, prompt_len_ptr, token_stride,
    vocab: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """How often each token was generated, and a high bit for those of the prompt."""
    _, row, at, place, _, real = _seen(
        counts_ptr, lines_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab, block
    )
    prompt_len = tl.load(prompt_len_ptr + row)
    bit = tl.full((block,), _PROMPT, tl.int32)
    tl.atomic_or(place, bit, mask=real & (at < prompt_len), sem="relaxed")
    one = tl.full((block,), 1, tl.int32)
    tl.atomic_add(place, one, mask=real & (at >= prompt_len), sem="relaxed")


@triton.jit(do_not_specialize=["token_stride", "stride"])
def penalties_kernel(
    counts_ptr, lines_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, prompt_len_ptr, token_stride,
    logits_ptr, repetition_ptr, frequency_ptr, presence_ptr, stride,
    vocab: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Whoever takes a token's count, of all its places in the sequence, changes its logit."""
    line, row, _, place, token, real = _seen(
        counts_ptr, lines_ptr, rows_ptr, num_tokens_ptr, token_ids_ptr, token_stride, vocab, block
    )
    zero = tl.full((block,), 0, tl.int32)
    count = tl.where(real, tl.atomic_xchg(place, zero, mask=real, sem="relaxed"), 0)
    mine = count != 0
    made = (count & (_PROMPT - 1)).to(tl.float32)
    logit_ptr = logits_ptr + line * stride + token
    x = tl.load(logit_ptr, mask=mine, other=0.0)
    factor = tl.load(repetition_ptr + row)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.load(frequency_ptr + row) * made
    x -= tl.where(made > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(logit_ptr, x, mask=mine)
