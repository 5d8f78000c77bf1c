"""The waiting requests in the order of their keys: a sorted front that policies see, and a heap for the rest.

``ForkGroups`` know which requests are parked until their parent's prompt is computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

from quire.core.contracts.policy_view import RequestColumns
from quire.core.request import Request
from quire.core.sched.running_batch import GatheredColumns, StateColumns

__all__ = ["MAX_VISIBLE", "ForkGroups", "WaitingQueue"]

MAX_VISIBLE = 512
"""Requests at the head of the queue that a policy sees, at most."""

_MIN_VISIBLE, _VISIBLE_PER_FREE_ROW = 32, 4
"""Requests that it sees while few rows are free, and how many more for each free row: enough to choose from, and no
columns of requests that could not be admitted."""

_HEAP_SLACK = 64
"""Entries of removed requests that the heap may hold beside twice its live ones before it is rebuilt."""


class WaitingQueue:
    """Requests by ``Request.queue_key``, the smallest first. No operation but ``reorder_requests`` takes time that
    grows with the queue's length beyond its logarithm.

    The first ``max_visible`` requests are a sorted list, with the columns that policies read at hand. The others wait
    in a heap; an entry whose request was removed stays there until it reaches the top. Parked requests belong to the
    queue but cannot be admitted yet: they are neither in the list nor in the heap.
    """

    def __init__(self, block_size: int, max_visible: int = MAX_VISIBLE) -> None:
        self._block_size = block_size
        self._max_visible = max_visible
        # The front: sorted keys, and beside each the slot of its request. One slot more than visible requests, because
        # an insertion into a full front comes before the removal of its last.
        self._front_keys: list[tuple[Any, ...]] = []
        self._front_slots: list[int] = []
        self._free_slots = list(range(max_visible, -1, -1))
        self._columns = StateColumns(max_visible + 1)
        self._slot_requests: list[Request | None] = [None] * (max_visible + 1)
        # The rest: a heap of keys, and the requests that are still there by key.
        self._heap: list[tuple[Any, ...]] = []
        self._heap_requests: dict[tuple[Any, ...], Request] = {}
        self._parked: dict[int, Request] = {}

    def __len__(self) -> int:
        return self.num_ready + len(self._parked)

    def __iter__(self) -> Iterator[Request]:
        yield from self.peek_requests(self._max_visible)
        yield from self._heap_requests.values()
        yield from self._parked.values()

    @property
    def num_ready(self) -> int:
        """Requests that may be admitted."""
        return len(self._front_keys) + len(self._heap_requests)

    @property
    def num_heap_entries(self) -> int:
        """Entries of the heap, those of removed requests included. For tests and debugging."""
        return len(self._heap)

    def add_request(self, request: Request) -> None:
        """Queue a request at its ``queue_key``, which no other request may have."""
        key, last = request.queue_key, self._max_visible - 1
        if len(self._front_keys) > last and key > self._front_keys[last]:
            self._push_heap(key, request)
            return
        self._insert_front(key, request)
        if len(self._front_keys) > self._max_visible:
            self._push_heap(self._front_keys[-1], self._delete_front(self._max_visible))

    def park_request(self, request: Request) -> None:
        """Keep a request that is not in the queue and has to wait for something before it may be admitted."""
        self._parked[request.request_id] = request

    def unpark_request(self, request: Request) -> None:
        """What the request waited for has happened: queue it."""
        self.add_request(self._parked.pop(request.request_id))

    def remove_request(self, request: Request) -> None:
        """Take a request out, wherever it is: parked, in the heap or in the front."""
        key = request.queue_key
        if self._parked.pop(request.request_id, None) is not None:
            return
        if self._heap_requests.pop(key, None) is not None:  # its key stays in the heap
            if len(self._heap) > _HEAP_SLACK + 2 * len(self._heap_requests):
                self._heap = list(self._heap_requests)
                heapq.heapify(self._heap)
            return
        self._delete_front(bisect_left(self._front_keys, key))
        self._refill_front()

    def count_visible(self, num_free_rows: int) -> int:
        """Requests that a policy is shown while ``num_free_rows`` could be admitted; none if none can be."""
        if not num_free_rows or not self.num_ready:
            return 0
        return min(self._max_visible, _MIN_VISIBLE + _VISIBLE_PER_FREE_ROW * num_free_rows)

    def peek_requests(self, limit: int) -> list[Request]:
        """The first ``limit`` requests that may be admitted, in order."""
        slot_requests: list[Any] = self._slot_requests
        return [slot_requests[slot] for slot in self._front_slots[:limit]]

    def view_columns(self, limit: int) -> RequestColumns:
        """``peek_requests(limit)`` as a policy sees them."""
        return GatheredColumns(self._columns, np.array(self._front_slots[:limit], np.int64), self._block_size)

    def reorder_requests(self) -> None:
        """Sort anew, after every ``queue_key`` may have changed. Takes time in proportion to the queue's length."""
        ready = [*self.peek_requests(self._max_visible), *self._heap_requests.values()]
        for index in reversed(range(len(self._front_keys))):
            self._delete_front(index)
        self._heap.clear()
        self._heap_requests.clear()
        for request in ready:
            self.add_request(request)

    def _insert_front(self, key: tuple[Any, ...], request: Request) -> None:
        index = bisect_left(self._front_keys, key)
        slot = self._free_slots[-1]
        self._columns.set_request(slot, request, 0, 0)  # first: where it raises, nothing has changed
        self._free_slots.pop()
        self._front_keys.insert(index, key)
        self._front_slots.insert(index, slot)
        self._slot_requests[slot] = request

    def _delete_front(self, index: int) -> Request:
        del self._front_keys[index]
        slot = self._front_slots.pop(index)
        self._free_slots.append(slot)
        request = self._slot_requests[slot]
        assert request is not None
        self._slot_requests[slot] = None
        return request

    def _push_heap(self, key: tuple[Any, ...], request: Request) -> None:
        self._heap_requests[key] = request
        heapq.heappush(self._heap, key)

    def _refill_front(self) -> None:
        while self._heap_requests and len(self._front_keys) < self._max_visible:
            key = heapq.heappop(self._heap)
            request = self._heap_requests.pop(key, None)
            if request is not None:  # None: it was removed while it was in the heap
                self._insert_front(key, request)


class ForkGroups:
    """Requests of one prompt (``n > 1``): the children, which wait until their parent's prompt is computed so as to
    share its blocks. True while any child waits."""

    def __init__(self) -> None:
        self._children: dict[int, list[Request]] = {}  # by the parent's id

    def __bool__(self) -> bool:
        return bool(self._children)

    def add_child(self, child: Request) -> None:
        """The child waits for its ``parent_id``."""
        assert child.parent_id is not None
        self._children.setdefault(child.parent_id, []).append(child)

    def pop_children(self, parent: Request) -> list[Request]:
        """The children that waited for ``parent``, in order of arrival. They wait no longer."""
        return self._children.pop(parent.request_id, [])

    def remove_child(self, request: Request) -> None:
        """The request no longer waits for a parent, if it did."""
        parent_id = request.parent_id
        if parent_id is None:
            return
        siblings = self._children.get(parent_id, [])
        if request in siblings:
            siblings.remove(request)
            if not siblings:
                del self._children[parent_id]
