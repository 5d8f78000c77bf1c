"""Drafts that cost nothing, to measure verification alone; see ``forced_acceptance`` of ``--speculative-config``."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sdk import DeviceProposer, DraftTokens

__all__ = ["SyntheticProposer"]


class SyntheticProposer(DeviceProposer):
    """Drafts the same tokens for everybody."""

    capturable = True

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """Token 1, 2, 3 ..."""
        tokens = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=rows.device)
        return DraftTokens(tokens.expand(len(rows), num_tokens))
