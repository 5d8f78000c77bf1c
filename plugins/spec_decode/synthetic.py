"""Constant drafts, which cost nothing, to measure verification alone with a given acceptance rate.

See ``forced_acceptance`` of ``--speculative-config``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sdk import DeviceProposer, DraftTokens

__all__ = ["SyntheticProposer"]


class SyntheticProposer(DeviceProposer):
    """Drafts the same tokens for every request."""

    capturable = True

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """Token 1, 2, 3 ..."""
        token_ids = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=rows.device)
        return DraftTokens(token_ids.expand(len(rows), num_tokens))
