"""Tensor parallelism as a layer sees it: which shard it is, and the collectives that it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.errors import ConfigError
from quire.core.ops.all_reduce import AllReduceKernels, SentParts

__all__ = ["CollectiveNotes", "NormedSum", "PartialSum", "TensorParallel"]

_MOST_NAMED_RANKS = 64
"""Larger numbers of ranks are not proposed."""


@dataclass(frozen=True, slots=True)
class NormedSum:
    """What a norm leaves of a sum."""

    normed: Tensor | QuantActivation
    stream: Tensor
    """The sum, residual included: what the next addition takes."""


class CollectiveNotes:
    """As a context manager around each collective operation it counts those that this rank has entered and left, so
    that a rank that waits for the others can be told from the one that they wait for."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """``counts`` (2,): entered and left, in memory that another process may see."""
        self._counts = counts

    def __enter__(self) -> None:
        self._counts[0] += 1

    def __exit__(self, *exception: object) -> None:
        self._counts[1] += 1


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer. ``TensorParallel(0, 1)`` is a model that is whole."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ``torch.distributed`` process group; None is the default group. Unused where ``size`` is 1."""
    kernels: AllReduceKernels | None = None
    """Quire's own sums, where the ranks are GPUs that map each other's memory."""
    notes: AbstractContextManager[None] = field(default_factory=nullcontext)
    """Entered around each collective operation in which the host may wait: ``CollectiveNotes`` where ranks are
    processes."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks, perhaps in place."""
        if self.size == 1:
            return x
        summed = None if self.kernels is None else self.kernels.all_reduce(x)
        if summed is not None:
            return summed
        with self.notes:
            dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_add_norm(
        self, part: Tensor, residual: Tensor, weight: Tensor, eps: float, output_format: ActivationFormat
    ) -> NormedSum | None:
        """The RMS norm of ``residual`` plus the sum of ``part`` over the ranks, both (num_tokens, features), in one
        kernel; None where that is not offered: then the caller does one after the other. Every rank gets the same
        answer."""
        fused = None
        if self.kernels is not None:
            fused = self.kernels.all_reduce_add_norm(part, residual, weight, eps, output_format)
        return None if fused is None else NormedSum(*fused)

    def multiply_and_send(self, x: Tensor, features: int, multiply: Callable[[Tensor], Tensor]) -> PartialSum | None:
        """``multiply(x)`` (rows, features), row by row a function of ``x``, as a sum over the ranks that are exchanging
        it already; None where that is not offered. Every rank gets the same answer."""
        if self.kernels is None:
            return None
        parts = self.kernels.multiply_and_send(x, features, multiply)
        return None if parts is None else SentPartialSum(parts.own, self, parts)

    def all_gather(self, x: Tensor) -> Tensor:
        """(n, shard) on every rank -> (n, size * shard), the shards side by side in order of rank."""
        if self.size == 1:
            return x
        return self.stack(x).transpose(0, 1).reshape(len(x), -1)

    def stack(self, x: Tensor) -> Tensor:
        """(...) on every rank -> (size, ...), in order of rank: one collective into one buffer."""
        if self.size == 1:
            return x[None]
        stacked = x.new_empty((self.size, *x.shape))
        # gloo takes the ranks as more rows of the first dimension alone
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # of which newer torch warns
        with self.notes:
            gather(stacked.flatten(0, 1), x.contiguous(), group=self.group)
        return stacked

    def divide_evenly(self, total: int, name: str) -> int:
        """``total`` over the number of ranks. Raises ``ConfigError``, naming it ``name``, where that is not whole."""
        if total % self.size:
            raise self.refuse_size(f"{name} is {total}", lambda size: total % size == 0)
        return total // self.size

    def refuse_size(self, reason: str, is_possible: Callable[[int], bool]) -> ConfigError:
        """The error for a model that this many ranks cannot share for ``reason``; it names the sizes that can."""
        sizes = [str(size) for size in range(1, _MOST_NAMED_RANKS + 1) if is_possible(size)]
        return ConfigError(
            f"{reason}, which {self.size} ranks cannot share evenly; "
            f"use a tensor_parallel_size of {', '.join(sizes[:-1])}{' or ' if sizes[:-1] else ''}{sizes[-1]}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class PartialSum:
    """The result of a row-parallel layer before the ranks have exchanged it: each has a part of the sum.

    It stands for the tensor between the layer and the norm that follows, so that one kernel can exchange, add the
    residual and norm. ``RMSNorm`` and ``Linear.forward_after_norm`` take it; anything else takes ``reduce()``. A model
    calls one of the three, once: ranks may have begun to exchange.
    """

    part: Tensor
    """What this rank has: (num_tokens, features), but for sums that derive from this, which have other rows or features
    there. Nothing to compute with."""
    parallel: TensorParallel

    @property
    def num_tokens(self) -> int:
        """Rows of the sum."""
        return len(self.part)

    def reduce(self) -> Tensor:
        """The sum (num_tokens, features), on every rank."""
        return self.parallel.all_reduce(self.part)

    def reduce_add_norm(
        self, residual: Tensor, norm: tuple[Tensor, float], output_format: ActivationFormat
    ) -> NormedSum | None:
        """As ``TensorParallel.all_reduce_add_norm``, with ``norm``'s weight and epsilon; None: ``reduce``."""
        return self.parallel.all_reduce_add_norm(self.part, residual, *norm, output_format)


@dataclass(frozen=True, slots=True, eq=False)
class SentPartialSum(PartialSum):
    """One that ranks have begun to exchange; ``part`` has the rows that this rank sums."""

    parts: SentParts

    @property
    def num_tokens(self) -> int:
        """Rows of all ranks."""
        return self.parts.num_rows

    def reduce(self) -> Tensor:
        """As of any other."""
        assert self.parallel.kernels is not None
        return self.parallel.kernels.finish_sum(self.parts, None, None, 0.0)[1]

    def reduce_add_norm(
        self, residual: Tensor, norm: tuple[Tensor, float], output_format: ActivationFormat
    ) -> NormedSum | None:
        """In one kernel, where what it gives is to have 16 bits."""
        if output_format.kind != "native" or not residual.is_contiguous():
            return None
        assert self.parallel.kernels is not None
        return NormedSum(*self.parallel.kernels.finish_sum(self.parts, residual, *norm))
