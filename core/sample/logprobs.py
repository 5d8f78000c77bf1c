"""Log-probabilities of chosen and best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather_logprobs"]


def gather_logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's raw distribution: ``logits`` (n, vocab), ``chosen`` (n,) -> ids (n, 1 + k) int32,
    log-probabilities (n, 1 + k) float32, ranks (n,) int32. Column 0 is the chosen token; rank 1 is the best.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, chosen.long()[:, None])
    ranks = (logprobs > own).sum(-1) + 1
    best, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return torch.cat((chosen[:, None].int(), ids.int()), 1), torch.cat((own, best), 1), ranks.int()
