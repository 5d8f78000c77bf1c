"""Rows of logits from which no token can be sampled, as negative numbers in the place of tokens.

They travel to the host with the tokens, so that noticing them takes no launch and no copy of its own. The request table
gets a token of the vocabulary in their place: steps that are queued already go on, and what they sample is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FIRST_PROCESSOR", "MASKED", "NO_LOGITS", "NO_TOKEN", "find_invalid_rows", "mark_invalid_rows"]

NO_LOGITS = -1
"""The logits that the model computed have a NaN, or none above minus infinity."""
NO_TOKEN = -2
"""What the sampler returned is no token of the vocabulary."""
MASKED = -3
"""Logits processors and the mask of a grammar together allow no token."""
FIRST_PROCESSOR = -4
"""The first logits processor made the row invalid; the second one has the number before this, and so on."""


def find_invalid_rows(logits: Tensor) -> Tensor:
    """(n,) bool: rows of ``logits`` (n, vocab) with a NaN, or without a logit above minus infinity."""
    return ~(logits.amax(-1) > float("-inf"))  # amax is NaN where a NaN is


def mark_invalid_rows(logits: Tensor, tokens: Tensor) -> Tensor:
    """``tokens`` (n,) int32, the argmax of each row of ``logits`` (n, vocab), with ``NO_LOGITS`` where it has a NaN or
    nothing above minus infinity. Torch's argmax of a row with a NaN is a NaN, so that one logit of a row says it."""
    best = logits.gather(-1, tokens.long()[:, None])[:, 0]
    return torch.where(best > float("-inf"), tokens, NO_LOGITS)
