"""What the sampling kernels write between their launches, allocated once, and the constants they are compiled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Candidates", "ChunkPicks", "PartSums", "Tiles", "Workspace"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a row of logits is cut. Never chosen by the batch, so that a row's sums do not depend on its neighbours."""

    groups_per_chunk: int = 16
    """Groups in a chunk; a program of ``sample_scan`` takes one chunk."""
    group_size: int = 256
    """Tokens in a group, whose best logit is kept to find the top k."""
    tile_size: int = 2048
    """Tokens that a program of ``sample_scan`` gives noise at a time."""
    num_parts: int = 8
    """Programs to a row in ``sample_resolve``."""
    max_candidates: int = 1024
    """Most tokens that top-k may have to choose from before it reads the whole row instead."""
    max_topk: int = 256
    """Largest k that is looked for among candidates."""

    @property
    def chunk_size(self) -> int:
        """Tokens in a chunk."""
        return self.groups_per_chunk * self.group_size


class ChunkPicks(NamedTuple):
    """By chunk of a row, (max_rows, num_chunks): its best noised token, from ``sample_scan`` to ``sample_resolve``.

    Logits are over temperature. Greedy rows, and ``argmax``, set ``noised``, without noise, and ``token`` alone.
    """

    noised: Tensor  # float32: logit plus noise of the chunk's pick
    logit: Tensor  # float32: its logit
    token: Tensor  # int32: its id
    max_logit: Tensor  # float32: the chunk's largest logit
    exp_sum: Tensor  # float32: sum of exp(logit - max_logit); no kernel reads it at present


class Candidates(NamedTuple):
    """By row: the tokens among which the top k are, used within ``sample_topk_candidates``."""

    groups: Tensor  # (max_rows, num_groups) int32: groups that have a candidate
    logit: Tensor  # (max_rows, max_candidates) float32: its logit over temperature
    token: Tensor  # (max_rows, max_candidates) int32
    mass_above: Tensor  # (max_rows, max_candidates) float32: sum of exp(logit - max) over candidates above it


class PartSums(NamedTuple):
    """By part of a row, (max_rows, num_parts): sums of exp(logit - max), used within ``sample_resolve``."""

    above: Tensor  # float32: above the pick
    above_next: Tensor  # float32: above the pick that would come next
    kept: Tensor  # float32: of the tokens that min-p leaves
    num_arrived: Tensor  # (max_rows, 1) int32: programs of a row that are done; zero between launches


class Workspace:
    """Scratch of ``max_rows`` rows of logits. The kernels share it: it serves one launch after another, on one stream.

    ``scan_constants``, ``topk_constants``, ``resolve_constants`` and ``argmax_constants`` hold the constants and the
    options of each kernel that depend on nothing but the vocabulary and the tiles.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, tiles: Tiles | None = None) -> None:
        tiles = tiles or Tiles()
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.num_parts = tiles.num_parts
        self.num_chunks = num_chunks = triton.cdiv(vocab_size, tiles.chunk_size)
        num_groups = num_chunks * tiles.groups_per_chunk

        def scratch(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(max_rows, width, dtype=dtype, device=device)

        self.chunks = ChunkPicks(
            scratch(num_chunks),
            scratch(num_chunks),
            scratch(num_chunks, torch.int32),
            scratch(num_chunks),
            scratch(num_chunks),
        )
        self.group_max = scratch(num_groups)
        """(max_rows, num_groups) float32: each group's largest logit over temperature, where a row has a top-k."""
        self.candidates = Candidates(
            scratch(num_groups, torch.int32),
            scratch(tiles.max_candidates),
            scratch(tiles.max_candidates, torch.int32),
            scratch(tiles.max_candidates),
        )
        self.parts = PartSums(
            scratch(tiles.num_parts), scratch(tiles.num_parts), scratch(tiles.num_parts), scratch(1, torch.int32)
        )
        tile_size = min(tiles.tile_size, tiles.chunk_size)
        shape = {"vocab_size": vocab_size, "num_chunks": num_chunks, "tile_size": tile_size}
        groups = {"groups_per_chunk": tiles.groups_per_chunk, "group_size": tiles.group_size}
        self.scan_constants: dict[str, Any] = {**shape, **groups, "num_warps": 8}
        self.topk_constants: dict[str, Any] = {
            **shape,
            **groups,
            "num_groups_block": triton.next_power_of_2(num_groups),
            "max_candidates": tiles.max_candidates,
            "max_topk": tiles.max_topk,
            "block": min(128, tiles.max_candidates),
            "other_block": min(32, tiles.max_candidates),
            "num_warps": 4,
        }
        self.resolve_constants: dict[str, Any] = {
            **shape,
            "num_chunks_block": triton.next_power_of_2(num_chunks),
            "chunk_size": tiles.chunk_size,
            "num_parts": tiles.num_parts,
            "num_warps": 8,
        }
        # Without noise a program has registers for two chunks, and half as many results are left to merge.
        self.num_argmax_chunks = triton.cdiv(vocab_size, 2 * tiles.chunk_size)
        self.argmax_constants: dict[str, Any] = {
            "vocab_size": vocab_size,
            "num_chunks": self.num_argmax_chunks,
            "num_chunks_block": triton.next_power_of_2(self.num_argmax_chunks),
            "chunk_size": 2 * tiles.chunk_size,
            "num_warps": 8,
        }
