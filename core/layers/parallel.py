"""Tensor parallelism as a layer sees it: which shard it is, and the two collectives that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quire.core.errors import ConfigError

__all__ = ["TensorParallel"]


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer. ``TensorParallel(0, 1)`` is a model that is whole."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ``torch.distributed`` process group; None is the default group. Unused where ``size`` is 1."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """(n, shard) on every rank -> (n, size * shard), the shards side by side in order of rank."""
        if self.size == 1:
            return x
        shards = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(shards, x.contiguous(), group=self.group)
        return torch.cat(shards, dim=-1)

    def divide_evenly(self, total: int, name: str) -> int:
        """``total`` over the number of ranks. Raises ``ConfigError``, naming it ``name``, where that is not whole."""
        if total % self.size:
            raise ConfigError(
                f"{name} is {total}, which {self.size} ranks cannot share evenly; "
                f"use a tensor_parallel_size that divides it"
            )
        return total // self.size
