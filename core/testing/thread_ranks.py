"""Ranks of a sharded model without processes: threads that exchange tensors."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from quire.core.layers.parallel import TensorParallel
from quire.core.layers.stage import PipelineStage
from quire.core.worker.pipeline import StageLink

__all__ = ["RankGroup", "StageChain", "ThreadRank", "ThreadStageLink", "run_on_ranks"]

_T = TypeVar("_T")
_TIME_LIMIT_S = 60


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
        object.__setattr__(self, "kernels", None)
        object.__setattr__(self, "rank_group", rank_group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        return self.stack(x).sum(0)

    def stack(self, x: Tensor) -> Tensor:
        """(...) on every rank -> (size, ...)."""
        self.rank_group.slots[self.rank] = x.clone()
        self.rank_group.barrier.wait(_TIME_LIMIT_S)
        stacked = torch.stack([part for part in self.rank_group.slots if part is not None])
        self.rank_group.barrier.wait(_TIME_LIMIT_S)
        return stacked


class StageChain:
    """What the stages of one pipeline share, each a thread."""

    def __init__(self, num_stages: int) -> None:
        self.barrier = threading.Barrier(num_stages)
        self.data: list[bytes] = [b""] * num_stages
        self.hidden: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(num_stages)]  # by receiver
        self.tokens: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(num_stages)]


class ThreadStageLink(StageLink):
    """Communicates through queues instead of process groups."""

    def __init__(self, stage: int, chain: StageChain) -> None:
        super().__init__(PipelineStage(stage, len(chain.hidden)))
        self._chain = chain

    def send_hidden_states(self, hidden: Tensor) -> None:
        """Never waits."""
        self._chain.hidden[self.stage.index + 1].put(hidden)

    def receive_hidden_states(self, buffer: Tensor) -> None:
        """Waits."""
        buffer.copy_(self._chain.hidden[self.stage.index].get(timeout=_TIME_LIMIT_S))

    def return_tokens(self, packed: Tensor) -> None:
        """Never waits."""
        for tokens in self._chain.tokens[:-1]:
            tokens.put(packed)

    def receive_tokens(self, buffer: Tensor) -> None:
        """Waits."""
        buffer.copy_(self._chain.tokens[self.stage.index].get(timeout=_TIME_LIMIT_S))

    def exchange_bytes(self, data: bytes) -> list[bytes]:
        """What each stage gives."""
        self._chain.data[self.stage.index] = data
        self._chain.barrier.wait(_TIME_LIMIT_S)
        exchanged = list(self._chain.data)
        self._chain.barrier.wait(_TIME_LIMIT_S)
        return exchanged


def run_on_ranks(size: int, function: Callable[[TensorParallel], _T]) -> list[_T]:
    """What ``function`` returns on each of ``size`` ranks, which run at the same time. Raises what the first raises."""
    group = RankGroup(threading.Barrier(size), [None] * size)

    def run(rank: int) -> _T:
        try:
            return function(ThreadRank(rank, size, group))
        except BaseException:
            group.barrier.abort()  # or the others wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
