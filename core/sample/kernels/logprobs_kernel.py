"""Log-probabilities without writing a row of them: one read of the logits, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_logsumexp_and_rank"]


def launch_logsumexp_and_rank(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``logits`` (n, vocab), rows dense, bf16, f16 or f32, ``chosen`` (n,) token ids -> the logarithm of each row's
    sum of exponentials (n,) float32, and each chosen token's rank (n,) int32: 1 + how many logits are higher."""
    n, vocab = logits.shape
    log_sum = torch.empty(n, dtype=torch.float32, device=logits.device)
    rank = torch.empty(n, dtype=torch.int32, device=logits.device)
    if n:
        logsumexp_and_rank_kernel[(n,)](
            logits, chosen, log_sum, rank, logits.stride(0), vocab=vocab, chunk=4096, num_warps=8
        )  # fmt: skip
    return log_sum, rank


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["chosen_ptr"])
def logsumexp_and_rank_kernel(
    logits_ptr, chosen_ptr, log_sum_ptr, rank_ptr, stride, vocab: tl.constexpr, chunk: tl.constexpr
):
    """Each lane keeps a running maximum and the sum of exponentials below it; they meet once, at the end."""
    line = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + line * stride
    own = tl.load(row_ptr + tl.load(chosen_ptr + line)).to(tl.float32)
    highest = tl.full((chunk,), -1e30, tl.float32)
    total = tl.zeros((chunk,), tl.float32)
    higher = tl.zeros((chunk,), tl.int32)
    for first in range(0, vocab, chunk):
        at = first + tl.arange(0, chunk)
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(highest, x)
        total = total * tl.exp(highest - peak) + tl.exp(x - peak)
        highest = peak
        higher += (x > own).to(tl.int32)
    largest = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp(highest - largest), axis=0)
    tl.store(log_sum_ptr + line, largest + tl.log(total))
    tl.store(rank_ptr + line, tl.sum(higher, axis=0) + 1)
