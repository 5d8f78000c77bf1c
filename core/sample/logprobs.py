"""Log-probabilities of chosen and best tokens, of the model's raw distribution: before penalties and temperature."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LogprobsTensors", "gather_logprobs"]


class LogprobsTensors(NamedTuple):
    """By logits row; column 0 is the chosen token, the k best follow in descending order."""

    token_ids: Tensor  # (n, 1 + k) int32
    logprobs: Tensor  # (n, 1 + k) float32
    ranks: Tensor  # (n,) int32, of the chosen token; 1 is the best


def gather_logprobs(logits: Tensor, chosen: Tensor, k: int, named: Tensor | None = None) -> LogprobsTensors:
    """Of ``logits`` (n, vocab) in any float dtype, the ``chosen`` (n,) tokens and the ``k`` best; in place of these the
    tokens of ``named`` (n, at least k) int64, where they are not negative.

    The log-softmax of a row is never written: ``log p = logit - logsumexp``, for the tokens that are wanted.
    """
    if logits.is_cuda:
        from quire.core.sample.kernels.logprobs_kernel import launch_logsumexp_and_rank

        log_sum, ranks = launch_logsumexp_and_rank(logits, chosen)
    else:
        log_sum, ranks = logsumexp_and_rank(logits, chosen)
    ids = chosen[:, None].long()
    if k:
        ids = torch.cat((ids, logits.topk(min(k, logits.shape[-1]), dim=-1).indices), 1)
    if named is not None:
        ids = torch.nn.functional.pad(ids, (0, 1 + named.shape[1] - ids.shape[1]))
        ids[:, 1:] = torch.where(named >= 0, named, ids[:, 1:])
    return LogprobsTensors(ids.int(), logits.gather(1, ids).float() - log_sum[:, None], ranks)


def logsumexp_and_rank(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of each row's sum of exponentials (n,) float32, and each chosen token's rank (n,) int32: 1 + how
    many logits are higher."""
    chosen_logit = logits.gather(1, chosen.long()[:, None])
    return logits.float().logsumexp(-1), (logits > chosen_logit).sum(-1).int() + 1
