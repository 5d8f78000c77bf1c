"""Random grouped weights and their packing, for the conformance checks: from the published layouts, without the code
that unpacks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RandomCodes", "pack_rows"]


@dataclass(frozen=True)
class RandomCodes:
    """Weights of few bits in groups of inputs: ``scale * (code - zero)``."""

    codes: Tensor  # (outputs, inputs) int64
    zeros: Tensor  # (outputs, groups) int64
    scales: Tensor  # (outputs, groups) float32
    group_size: int

    @classmethod
    def make(cls, outputs: int, inputs: int, *, bits: int = 4, group_size: int = 32, seed: int = 0) -> RandomCodes:
        """Codes of every value, zero points in the middle, scales that differ by a factor of three."""
        generator = torch.Generator().manual_seed(seed + outputs)
        groups = inputs // group_size
        return cls(
            torch.randint(0, 1 << bits, (outputs, inputs), generator=generator),
            torch.randint(1 << (bits - 2), 3 << (bits - 2), (outputs, groups), generator=generator),
            (torch.rand(outputs, groups, generator=generator) + 0.5) / 16,
            group_size,
        )

    def dequantize(self, zeros: Tensor | None = None) -> Tensor:
        """(outputs, inputs) float32; with other ``zeros`` than its own where a format has fixed ones."""
        used = self.zeros if zeros is None else zeros
        zero, scale = (each.repeat_interleave(self.group_size, 1) for each in (used, self.scales))
        return (self.codes - zero) * scale


def pack_rows(codes: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """(rows, n) codes -> (rows, n * bits / 32) int32, the first code in the lowest bits; with ``order``, that of each
    word's codes: ``order[i]`` is the column that lies in the ``i``-th lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(len(codes), codes.shape[1] // per_word, dtype=torch.int64)
    for place, column in enumerate(order or range(per_word)):
        words |= codes[:, column::per_word] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
