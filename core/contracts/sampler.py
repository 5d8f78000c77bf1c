"""Sampler: from logits to tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sampler", "SamplingBatch"]


@dataclass(slots=True)
class SamplingBatch:
    """Sampling parameters of the rows that draw a token this step; device tensors unless said.

    The booleans are host knowledge, true when any row needs the feature, so that a sampler can skip it.
    """

    temperature: Tensor  # (n,) float32, 0 is greedy
    top_k: Tensor  # (n,) int32, 0 is off
    top_p: Tensor  # (n,) float32
    min_p: Tensor  # (n,) float32
    seed: Tensor  # (n,) int64
    position: Tensor  # (n,) int64: index in the sequence of the token to draw
    any_random: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool


class Sampler(ABC):
    """Draws ``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens (the Gumbel-max trick).

    The noise depends on (seed, position, token) alone, so a request draws the same tokens whatever runs beside it,
    and drafts are verified by drawing again.
    """

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.options = options

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) float32, penalties and processors applied, may be overwritten. Returns (n,) int32."""
