"""What the sampling kernels write between their launches, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tiles", "Workspace"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a row of logits is cut. Never chosen by the batch, so that a row's sums do not depend on its neighbours."""

    groups_per_chunk: int = 16
    """Groups in a chunk; a program of the first pass takes one chunk."""
    group_size: int = 256
    """Tokens in a group, whose best logit is kept to find the top k."""
    tile_size: int = 2048
    """Tokens that a program of the first pass gives noise at a time."""
    num_parts: int = 8
    """Programs to a row in the second pass."""
    max_candidates: int = 1024
    """Most tokens that top-k may have to choose from before it takes the slow way."""
    max_topk: int = 256
    """Largest k that takes the fast way."""

    @property
    def chunk_size(self) -> int:
        """Tokens in a chunk."""
        return self.groups_per_chunk * self.group_size


class Workspace:
    """Scratch of ``max_rows`` rows: by chunk, by group, by part, and the shortlist of each row. Counters stay zero."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, tiles: Tiles | None = None) -> None:
        self.tiles = tiles = tiles or Tiles()
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.num_chunks = -(-vocab_size // tiles.chunk_size)
        self.num_groups = self.num_chunks * tiles.groups_per_chunk

        def scratch(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(max_rows, width, dtype=dtype, device=device)

        self.chunk_best = scratch(self.num_chunks)  # noised logit of the chunk's pick
        self.chunk_logit = scratch(self.num_chunks)  # its logit over temperature
        self.chunk_token = scratch(self.num_chunks, torch.int32)
        self.chunk_max = scratch(self.num_chunks)
        self.chunk_sum = scratch(self.num_chunks)  # of exp(logit - chunk_max)
        self.group_max = scratch(self.num_groups)
        self.group_list = scratch(self.num_groups, torch.int32)
        self.part_above = scratch(tiles.num_parts)  # of exp(logit - max) above the pick
        self.part_higher = scratch(tiles.num_parts)  # above the pick that would come next
        self.part_kept = scratch(tiles.num_parts)  # of exp(logit - max) that min-p leaves
        self.list_logit = scratch(tiles.max_candidates)
        self.list_token = scratch(tiles.max_candidates, torch.int32)
        self.list_above = scratch(tiles.max_candidates)  # of exp(logit - max) above it
        self.counter = scratch(1, torch.int32)
