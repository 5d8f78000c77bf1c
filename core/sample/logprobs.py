"""Log-probabilities of chosen and best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.sample.kernels.logprobs_kernel import launch_logsumexp_and_rank

__all__ = ["gather_logprobs"]


def gather_logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's raw distribution: ``logits`` (n, vocab), ``chosen`` (n,) -> ids (n, 1 + k) int32,
    log-probabilities (n, 1 + k) float32, ranks (n,) int32. Column 0 is the chosen token; rank 1 is the best.
    """
    if logits.is_cuda:
        log_sum, ranks = launch_logsumexp_and_rank(logits, chosen)
    else:
        log_sum, ranks = _logsumexp_and_rank(logits, chosen)
    ids = chosen[:, None].long()
    if k:
        ids = torch.cat((ids, logits.topk(min(k, logits.shape[-1]), dim=-1).indices), 1)
    return ids.int(), logits.gather(1, ids).float() - log_sum[:, None], ranks


def _logsumexp_and_rank(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What ``normalize`` does, in torch."""
    own = logits.gather(1, chosen.long()[:, None])
    return logits.float().logsumexp(-1), (logits > own).sum(-1).int() + 1
