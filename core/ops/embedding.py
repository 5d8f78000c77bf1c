"""Token embedding, whole or one shard of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["embedding"]


def embedding(token_ids: Tensor, weight: Tensor, first_token_id: int = 0, is_whole: bool = True) -> Tensor:
    """Rows of ``weight`` (rows, hidden) for ``ids`` (num_tokens,) int -> (num_tokens, hidden).

    Where ``weight`` holds only the tokens ``first .. first + rows``, pass ``whole=False``: other tokens give zeros, so
    that the sum over the shards is the embedding.
    """
    if is_whole:
        return F.embedding(token_ids, weight)
    local_ids = token_ids - first_token_id
    in_shard = (local_ids >= 0) & (local_ids < weight.shape[0])
    return F.embedding(local_ids.where(in_shard, 0), weight) * in_shard.unsqueeze(-1)
