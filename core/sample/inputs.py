"""What sampling's operations and kernels read: parameters by request, and which rows of the logits are whose.

Two kinds of rows occur here. A *row* without more is one of the request table, where a request stays while it runs; a
*logits row* is one of a step's logits, of which a request has one for its next token and one for each draft to verify.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["DraftSpans", "PenaltyColumns", "SamplingColumns"]


class SamplingColumns(NamedTuple):
    """Sampling parameters on the device, by row of the request table or by logits row.

    A tuple, since every sampling kernel takes all of them, in this order: ``*columns``.
    """

    temperature: Tensor  # (rows,) float32, 0 is greedy
    top_k: Tensor  # (rows,) int32, 0 is off
    top_p: Tensor  # (rows,) float32, 1 is off
    min_p: Tensor  # (rows,) float32, 0 is off
    seed: Tensor  # (rows,) int64
    position: Tensor  # (rows,) int32 or int64: index in the sequence of the token to sample; the table's ``num_tokens``


class PenaltyColumns(NamedTuple):
    """The request table's columns that penalties read."""

    token_ids: Tensor  # (rows, length) int32
    prompt_len: Tensor  # (rows,) int32
    repetition: Tensor  # (rows,) float32, 1 is off
    frequency: Tensor  # (rows,) float32, 0 is off
    presence: Tensor  # (rows,) float32, 0 is off


@dataclass(frozen=True, slots=True)
class DraftSpans:
    """The logits rows of each request that samples: one for its next token, and one for every draft granted to it.

    Those of a request are neighbours. Logits row ``start + i`` predicts the token after the first ``i`` drafts.
    """

    rows: Tensor  # (n,) int64, of the request table
    start: Tensor  # (n,) int64: the request's first logits row
    num_drafts: Tensor  # (n,) int64: logits rows beyond the first
    max_len: int
    """The most logits rows of any request, known on the host."""
