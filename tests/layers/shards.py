"""Ranks without processes: one alone, whose collectives are left to the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.layers import LayerBuilder
from quire.core.layers.parallel import TensorParallel
from quire.plugins.quant.none import Unquantized

__all__ = ["Alone", "load_tensors", "make_builder"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Alone(TensorParallel):
    """A rank whose collectives return what it put in."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


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
