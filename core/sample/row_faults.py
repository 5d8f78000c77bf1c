"""Rows of logits from which no token can be sampled, as negative numbers in the place of tokens.

They travel to the host with the tokens, so that noticing them takes no launch and no copy of its own. The request table
gets a token of the vocabulary in their place: steps that are queued already go on, and what they sample is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MASKED",
    "NO_LOGITS",
    "NO_TOKEN",
    "ProcessorFault",
    "fault_of_failed_processor",
    "fault_of_processor",
    "find_invalid_rows",
    "mark_invalid_rows",
    "parse_processor_fault",
]

NO_LOGITS = -1
"""The logits that the model computed have a NaN, or none above minus infinity."""
NO_TOKEN = -2
"""What the sampler returned is no token of the vocabulary."""
MASKED = -3
"""Logits processors and the mask of a grammar together allow no token."""
_FIRST_PROCESSOR = -4


class ProcessorFault(NamedTuple):
    """A row that a logits processor left without a token, or for which it raised."""

    place: int
    """Of the processor the order in which they are applied."""
    has_raised: bool


def fault_of_processor(index: int) -> int:
    """The fault of rows in which this logits processor left no token."""
    return _FIRST_PROCESSOR - 2 * index


def fault_of_failed_processor(index: int) -> int:
    """The fault of rows for which it raised, or did not return."""
    return _FIRST_PROCESSOR - 2 * index - 1


def parse_processor_fault(fault: int) -> ProcessorFault | None:
    """Which processor a fault is of; None: of none."""
    place, has_raised = divmod(_FIRST_PROCESSOR - fault, 2)
    return None if fault > _FIRST_PROCESSOR else ProcessorFault(place, bool(has_raised))


def find_invalid_rows(logits: Tensor) -> Tensor:
    """(n,) bool: rows of ``logits`` (n, vocab) with a NaN, or without a logit above minus infinity."""
    return ~(logits.amax(-1) > float("-inf"))  # amax is NaN where a NaN is


def mark_invalid_rows(logits: Tensor, tokens: Tensor) -> Tensor:
    """``tokens`` (n,) int32, the argmax of each row of ``logits`` (n, vocab), with ``NO_LOGITS`` where it has a NaN or
    nothing above minus infinity. Torch's argmax of a row with a NaN is a NaN, so that one logit of a row says it."""
    best = logits.gather(-1, tokens.long()[:, None])[:, 0]
    return torch.where(best > float("-inf"), tokens, NO_LOGITS)
