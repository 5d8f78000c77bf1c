"""The waiting requests in the order of their keys: a sorted front, and a heap for the rest."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

from quire.core.contracts.policy import RequestColumns
from quire.core.request import Request
from quire.core.sched.request_columns import VIEW_FIELDS, TableColumns, describe

__all__ = ["FRONT", "WaitingQueue"]

FRONT = 512
"""The most requests a policy sees."""


class WaitingQueue:
    """Requests by ``rank``, smallest first. No operation but ``resort`` takes time that grows with the queue's length
    beyond its logarithm.

    The best ``FRONT`` are a sorted list with their columns at hand; the others wait in a heap from which removed
    ones are dropped when they surface. Parked requests are in the queue but not ready: they are in neither.
    """

    def __init__(self, block_size: int, front: int = FRONT) -> None:
        self._block_size = block_size
        self._size = front
        self._front: list[tuple[Any, ...]] = []  # ranks, sorted
        self._slots: list[int] = []  # beside them, their columns in _data
        self._free_slots = list(range(front, -1, -1))
        self._data = np.zeros((VIEW_FIELDS, front + 1), np.int64)
        self._by_slot: list[Request | None] = [None] * (front + 1)
        self._heap: list[tuple[Any, ...]] = []
        self._heaped: dict[tuple[Any, ...], Request] = {}
        self._parked: dict[str, Request] = {}

    def __len__(self) -> int:
        return self.num_ready + len(self._parked)

    @property
    def num_ready(self) -> int:
        """Requests that may be admitted."""
        return len(self._front) + len(self._heaped)

    def __iter__(self) -> Iterator[Request]:
        yield from self.window(self._size)
        yield from self._heaped.values()
        yield from self._parked.values()

    def add(self, request: Request) -> None:
        """Queue a request at its ``rank``, which no other may have."""
        rank, last = request.queue_key, self._size - 1
        if len(self._front) > last and rank > self._front[last]:
            self._push(rank, request)
            return
        self._insert(rank, request)
        if len(self._front) > self._size:
            self._push(self._front[-1], self._delete(self._size))

    def park(self, request: Request) -> None:
        """Keep a request that is not in the queue, but must wait for something before it is ``add``ed."""
        self._parked[request.request_id] = request

    def unpark(self, request: Request) -> None:
        """What it waited for has come."""
        self.add(self._parked.pop(request.request_id))

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        rank = request.queue_key
        if self._parked.pop(request.request_id, None) is not None:
            return
        if self._heaped.pop(rank, None) is not None:
            if len(self._heap) > 64 + 2 * len(self._heaped):
                self._heap = list(self._heaped)
                heapq.heapify(self._heap)
            return
        self._delete(bisect_left(self._front, rank))
        self._refill()

    def window(self, limit: int) -> list[Request]:
        """The best ready requests, in order."""
        by_slot: list[Any] = self._by_slot
        return [by_slot[slot] for slot in self._slots[:limit]]

    def view(self, limit: int) -> RequestColumns:
        """``window(limit)`` as columns."""
        return TableColumns(self._data, np.array(self._slots[:limit], np.int64), self._block_size)

    def resort(self) -> None:
        """Every ``rank`` may have changed. Takes time in proportion to the queue."""
        ready = [*self.window(self._size), *self._heaped.values()]
        for index in reversed(range(len(self._front))):
            self._delete(index)
        self._heap.clear()
        self._heaped.clear()
        for request in ready:
            self.add(request)

    def _insert(self, rank: tuple[Any, ...], request: Request) -> None:
        index = bisect_left(self._front, rank)
        slot = self._free_slots.pop()
        self._front.insert(index, rank)
        self._slots.insert(index, slot)
        self._by_slot[slot] = request
        self._data[:, slot] = describe(request, 0, 0)

    def _delete(self, index: int) -> Request:
        del self._front[index]
        slot = self._slots.pop(index)
        self._free_slots.append(slot)
        request: Any = self._by_slot[slot]
        self._by_slot[slot] = None
        return request

    def _push(self, rank: tuple[Any, ...], request: Request) -> None:
        self._heaped[rank] = request
        heapq.heappush(self._heap, rank)

    def _refill(self) -> None:
        while self._heaped and len(self._front) < self._size:
            rank = heapq.heappop(self._heap)
            request = self._heaped.pop(rank, None)
            if request is not None:
                self._insert(rank, request)
