"""Log-probabilities without writing a row of them: one read of the logits, a program a row.

The sum of exponentials is the online one of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_logsumexp_and_rank"]


def launch_logsumexp_and_rank(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quire.core.sample.logprobs.logsumexp_and_rank``: ``logits`` (n, vocab), rows dense, bf16, f16 or f32."""
    n, vocab_size = logits.shape
    log_sum = torch.empty(n, dtype=torch.float32, device=logits.device)
    rank = torch.empty(n, dtype=torch.int32, device=logits.device)
    if n:
        logsumexp_and_rank_kernel[(n,)](
            logits, chosen, log_sum, rank, logits.stride(0), vocab_size=vocab_size, chunk_size=4096, num_warps=8
        )  # fmt: skip
    return log_sum, rank


# ``chosen`` may be a column of a table and ``logits`` a slice of a padded vocabulary: neither compiles it anew.
@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["chosen_ptr"])
def logsumexp_and_rank_kernel(
    logits_ptr, chosen_ptr, log_sum_ptr, rank_ptr, stride, vocab_size: tl.constexpr, chunk_size: tl.constexpr
):
    """Each lane keeps a running maximum and the sum of exponentials below it; they meet once, at the end."""
    logits_row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + logits_row * stride
    chosen_logit = tl.load(row_ptr + tl.load(chosen_ptr + logits_row)).to(tl.float32)
    highest = tl.full((chunk_size,), -1e30, tl.float32)  # not -inf: inf - inf would be a NaN in a masked lane
    total = tl.zeros((chunk_size,), tl.float32)
    num_higher = tl.zeros((chunk_size,), tl.int32)
    for first in range(0, vocab_size, chunk_size):
        tokens = first + tl.arange(0, chunk_size)
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        new_highest = tl.maximum(highest, x)
        total = total * tl.exp(highest - new_highest) + tl.exp(x - new_highest)
        highest = new_highest
        num_higher += (x > chosen_logit).to(tl.int32)
    largest = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp(highest - largest), axis=0)
    tl.store(log_sum_ptr + logits_row, largest + tl.log(total))
    tl.store(rank_ptr + logits_row, tl.sum(num_higher, axis=0) + 1)
