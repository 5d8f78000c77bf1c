"""Positions that a model learned, one vector each, as GPT-2 and OPT have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader, make_copy_loader

__all__ = ["LearnedPositions"]


class LearnedPositions(CheckpointLayer):
    """Position -> vector, the same on every rank."""

    def __init__(
        self, name: str, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device, offset: int = 0
    ) -> None:
        """``offset``: the row of position 0 (OPT: 2). ``num_rows`` counts those before it too."""
        super().__init__()
        self.name = name
        self.offset = offset
        weight = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (num_rows, hidden)

    def forward(self, positions: Tensor) -> Tensor:
        """(num_tokens,) int -> (num_tokens, hidden). A position beyond the table, which only a draft that is dropped
        later can have, gets the last row."""
        return self.weight[(positions + self.offset).clamp(max=len(self.weight) - 1)]

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """The table."""
        return {f"{self.name}.weight": make_copy_loader(f"{self.name}.weight", self.weight)}
