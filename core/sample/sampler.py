"""The bundled sampler: one rule for greedy, random and verified tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch
from quire.core.sample.filters import apply_filters
from quire.core.sample.noise import gumbel

__all__ = ["GumbelSampler"]


class GumbelSampler(Sampler):
    """``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens; at 0 the plain argmax."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) float32 -> (n,) int32."""
        if not batch.any_random:
            return logits.argmax(-1).int()
        random = batch.temperature > 0
        logits.div_(torch.where(random, batch.temperature, 1.0)[:, None])
        logits = apply_filters(logits, batch)
        noise = gumbel(batch.seed, batch.position, logits.shape[-1])
        return torch.where(random[:, None], logits + noise, logits).argmax(-1).int()
