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

__all__ = ["MAX_VISIBLE", "WaitingQueue"]

MAX_VISIBLE = 512
"""The most requests a policy sees."""


class WaitingQueue:
    """Requests by ``rank``, smallest first. No operation but ``resort`` takes time that grows with the queue's length
    beyond its logarithm.

    The best ``FRONT`` are a sorted list with their columns at hand; the others wait in a heap from which removed
    ones are dropped when they surface. Parked requests are in the queue but not ready: they are in neither.
    """

    def __init__(self, block_size: int, max_visible: int = MAX_VISIBLE) -> None:
        self._block_size = block_size
        self._max_visible = max_visible
        self._front_keys: list[tuple[Any, ...]] = []  # ranks, sorted
        self._front_slots: list[int] = []  # beside them, their columns in _data
        self._free_slots = list(range(max_visible, -1, -1))
        self._data = np.zeros((VIEW_FIELDS, max_visible + 1), np.int64)
        self._slot_requests: list[Request | None] = [None] * (max_visible + 1)
        self._heap: list[tuple[Any, ...]] = []
        self._heap_requests: dict[tuple[Any, ...], Request] = {}
        self._parked: dict[str, Request] = {}

    def __len__(self) -> int:
        return self.num_ready + len(self._parked)

    @property
    def num_ready(self) -> int:
        """Requests that may be admitted."""
        return len(self._front_keys) + len(self._heap_requests)

    def __iter__(self) -> Iterator[Request]:
        yield from self.peek_requests(self._max_visible)
        yield from self._heap_requests.values()
        yield from self._parked.values()

    def add_request(self, request: Request) -> None:
        """Queue a request at its ``rank``, which no other may have."""
        rank, last = request.queue_key, self._max_visible - 1
        if len(self._front_keys) > last and rank > self._front_keys[last]:
            self._push_heap(rank, request)
            return
        self._insert_front(rank, request)
        if len(self._front_keys) > self._max_visible:
            self._push_heap(self._front_keys[-1], self._delete_front(self._max_visible))

    def park_request(self, request: Request) -> None:
        """Keep a request that is not in the queue, but must wait for something before it is ``add``ed."""
        self._parked[request.request_id] = request

    def unpark_request(self, request: Request) -> None:
        """What it waited for has come."""
        self.add_request(self._parked.pop(request.request_id))

    def remove_request(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        rank = request.queue_key
        if self._parked.pop(request.request_id, None) is not None:
            return
        if self._heap_requests.pop(rank, None) is not None:
            if len(self._heap) > 64 + 2 * len(self._heap_requests):
                self._heap = list(self._heap_requests)
                heapq.heapify(self._heap)
            return
        self._delete_front(bisect_left(self._front_keys, rank))
        self._refill_front()

    def peek_requests(self, limit: int) -> list[Request]:
        """The best ready requests, in order."""
        by_slot: list[Any] = self._slot_requests
        return [by_slot[slot] for slot in self._front_slots[:limit]]

    def view_columns(self, limit: int) -> RequestColumns:
        """``window(limit)`` as columns."""
        return TableColumns(self._data, np.array(self._front_slots[:limit], np.int64), self._block_size)

    def reorder_requests(self) -> None:
        """Every ``rank`` may have changed. Takes time in proportion to the queue."""
        ready = [*self.peek_requests(self._max_visible), *self._heap_requests.values()]
        for index in reversed(range(len(self._front_keys))):
            self._delete_front(index)
        self._heap.clear()
        self._heap_requests.clear()
        for request in ready:
            self.add_request(request)

    def _insert_front(self, rank: tuple[Any, ...], request: Request) -> None:
        index = bisect_left(self._front_keys, rank)
        slot = self._free_slots.pop()
        self._front_keys.insert(index, rank)
        self._front_slots.insert(index, slot)
        self._slot_requests[slot] = request
        self._data[:, slot] = describe(request, 0, 0)

    def _delete_front(self, index: int) -> Request:
        del self._front_keys[index]
        slot = self._front_slots.pop(index)
        self._free_slots.append(slot)
        request: Any = self._slot_requests[slot]
        self._slot_requests[slot] = None
        return request

    def _push_heap(self, rank: tuple[Any, ...], request: Request) -> None:
        self._heap_requests[rank] = request
        heapq.heappush(self._heap, rank)

    def _refill_front(self) -> None:
        while self._heap_requests and len(self._front_keys) < self._max_visible:
            rank = heapq.heappop(self._heap)
            request = self._heap_requests.pop(rank, None)
            if request is not None:
                self._insert_front(rank, request)
