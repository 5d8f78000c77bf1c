"""Token embedding, whole or one shard of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["embedding"]


def embedding(ids: Tensor, weight: Tensor, first: int = 0, whole: bool = True) -> Tensor:
    """Rows of ``weight`` (rows, hidden) for ``ids`` (num_tokens,) int -> (num_tokens, hidden).

    Where ``weight`` holds only the tokens ``first .. first + rows``, pass ``whole=False``: other tokens give zeros, so
    that the sum over the shards is the embedding.
    """
    if whole:
        return F.embedding(ids, weight)
    local = ids - first
    mine = (local >= 0) & (local < weight.shape[0])
    return F.embedding(local.where(mine, 0), weight) * mine.unsqueeze(-1)
