"""Ranks without processes: threads that exchange, or one alone whose collectives are left to the test."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.core.layers import LayerBuilder
from quire.core.layers.parallel import TensorParallel
from quire.plugins.quant.none import Unquantized

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Alone(TensorParallel):
    """A rank whose collectives return what it put in."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


@dataclass
class RankGroup:
    """What the ranks of one model share, each a thread."""

    barrier: threading.Barrier
    slots: list[Tensor | None]


@dataclass(frozen=True)
class ThreadRank(TensorParallel):
    """Communicates through a list instead of a process group."""

    rank_group: RankGroup = field(default_factory=lambda: RankGroup(threading.Barrier(1), [None]))

    def __init__(self, rank: int, size: int, rank_group: RankGroup) -> None:
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "rank_group", rank_group)

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum(self._all_gather(x))  # type: ignore[return-value]

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._all_gather(x), dim=-1)

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        self.rank_group.slots[self.rank] = x.clone()
        self.rank_group.barrier.wait(60)
        parts = [part for part in self.rank_group.slots if part is not None]
        self.rank_group.barrier.wait(60)
        return parts


def make_builder(rank: int = 0, size: int = 1, **fields: Any) -> LayerBuilder:
    parallel = Alone(rank, size)
    return LayerBuilder(torch.float32, CPU, torch.float32, 16, Unquantized({}), parallel, **fields)


def load_tensors(layer: Any, tensors: dict[str, Tensor]) -> None:
    """Load a layer from checkpoint tensors, which are exactly those that it asks for."""
    loaders = layer.weight_loaders()
    assert loaders.keys() == tensors.keys()
    for name, load in loaders.items():
        load(tensors[name])
    layer.process_weights_after_loading()
