"""What the sampling kernels write between their launches, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tiles", "Workspace"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a row of logits is cut. Never chosen by the batch, so that a row's sums do not depend on its neighbours."""

    groups: int = 16
    """Groups in a chunk; a program of the first pass takes one chunk."""
    width: int = 256
    """Tokens in a group, whose best logit is kept to find the top k."""
    tile: int = 2048
    """Tokens that a program of the first pass gives noise at a time."""
    parts: int = 8
    """Programs to a row in the second pass."""
    shortlist: int = 1024
    """Most tokens that top-k may have to choose from before it takes the slow way."""
    most_k: int = 256
    """Largest k that takes the fast way."""

    @property
    def chunk(self) -> int:
        """Tokens in a chunk."""
        return self.groups * self.width


class Workspace:
    """Scratch of ``max_rows`` rows: by chunk, by group, by part, and the shortlist of each row. Counters stay zero."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, tiles: Tiles | None = None) -> None:
        self.tiles = tiles = tiles or Tiles()
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.splits = -(-vocab_size // tiles.chunk)
        self.num_groups = self.splits * tiles.groups

        def scratch(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(max_rows, width, dtype=dtype, device=device)

        self.chunk_best = scratch(self.splits)  # noised logit of the chunk's pick
        self.chunk_logit = scratch(self.splits)  # its logit over temperature
        self.chunk_token = scratch(self.splits, torch.int32)
        self.chunk_max = scratch(self.splits)
        self.chunk_sum = scratch(self.splits)  # of exp(logit - chunk_max)
        self.group_max = scratch(self.num_groups)
        self.group_list = scratch(self.num_groups, torch.int32)
        self.part_above = scratch(tiles.parts)  # of exp(logit - max) above the pick
        self.part_higher = scratch(tiles.parts)  # above the pick that would come next
        self.part_kept = scratch(tiles.parts)  # of exp(logit - max) that min-p leaves
        self.list_logit = scratch(tiles.shortlist)
        self.list_token = scratch(tiles.shortlist, torch.int32)
        self.list_above = scratch(tiles.shortlist)  # of exp(logit - max) above it
        self.counter = scratch(1, torch.int32)
