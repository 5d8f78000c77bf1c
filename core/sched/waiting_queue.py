"""The waiting requests in the order of their keys: a sorted list that policies see, and a heap for the rest.

``ForkGroups`` know which requests are parked until their parent's prompt is computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import RequestColumns
from quire.core.request import Request
from quire.core.sched.request_columns import StateColumns, WaitingColumns
from quire.core.sched.running_batch import RunningBatch

__all__ = ["MAX_VISIBLE", "ForkGroups", "WaitingQueue"]

MAX_VISIBLE = 512
"""Requests at the head of the queue that a policy sees, at most."""

_MIN_VISIBLE, _VISIBLE_PER_FREE_ROW = 32, 4
"""Requests that it sees while few rows are free, and how many more for each free row: enough to choose from, and no
columns of requests that could not be admitted."""

_NONE: NDArray[np.int64] = np.empty(0, np.int64)

_HEAP_SLACK = 64
"""Entries of removed requests that the heap may hold beside twice its live ones before it is rebuilt."""


class WaitingQueue:
    """Requests by ``Request.queue_key``, the smallest first. No operation but ``reorder_requests`` takes time that
    grows with the queue's length beyond its logarithm.

    The first ``max_visible`` requests are a sorted list, with the columns that policies read at hand. The others wait
    in a heap; an entry whose request was removed stays there until it reaches the top. Where the policy has groups,
    each has a list and a heap of its own (a lane), and the lists share ``max_visible`` among them. Parked requests
    belong to the queue but cannot be admitted yet: they are neither in a list nor in a heap.
    """

    def __init__(self, block_size: int, max_visible: int = MAX_VISIBLE) -> None:
        self._block_size = block_size
        self._max_visible = max_visible
        # By group, those with requests alone. A group that comes anew is the last.
        self._lanes: dict[int, _Lane] = {}
        # Each request in a lane's list has a slot. One slot more than visible requests, because an insertion into a
        # full list comes before the removal of its last.
        self._free_slots = list(range(max_visible, -1, -1))
        self._columns = StateColumns(max_visible + 1)
        self._slot_requests: list[Request | None] = [None] * (max_visible + 1)
        self._visible: list[int] = []  # what ``_visible_slots`` gave last, also as an array,
        self._visible_index = np.empty(0, np.int64)
        self._visible_limit = -1  # and for which limit; -1: the queue has changed since
        self._no_columns = WaitingColumns(self._columns, _NONE, block_size, _NONE)
        self._parked: dict[int, Request] = {}
        self._num_ready = 0
        self.hold_back: Callable[[Request], bool] | None = None
        """Asked of each request that is to be queued: if true, it is parked instead."""

    def __len__(self) -> int:
        return self._num_ready + len(self._parked)

    def __iter__(self) -> Iterator[Request]:
        yield from self._iter_ready()
        yield from self._parked.values()

    @property
    def num_ready(self) -> int:
        """Requests that may be admitted."""
        return self._num_ready

    @property
    def num_heap_entries(self) -> int:
        """Entries of the heaps, those of removed requests included. For tests and debugging."""
        return sum(len(lane.heap) for lane in self._lanes.values())

    def add_request(self, request: Request) -> None:
        """Queue a request at its ``queue_key``, which no other request may have; or park it, if ``hold_back`` says."""
        if self.hold_back is not None and self.hold_back(request):
            self.park_request(request)
            return
        lane = self._lanes.get(request.group_index)
        if lane is None:
            lane = _Lane(max(self._max_visible // (1 + len(self._lanes)), 1))
            self._lanes[request.group_index] = lane
        key = request.queue_key
        if len(lane.front_keys) >= lane.max_front and key > lane.front_keys[-1]:
            lane.push_heap(key, request)
        else:
            self._insert_front(lane, key, request)
            if len(lane.front_keys) > lane.max_front:
                lane.push_heap(lane.front_keys[-1], self._delete_front(lane, len(lane.front_keys) - 1))
        self._num_ready += 1
        self._visible_limit = -1

    def park_request(self, request: Request) -> None:
        """Keep a request that is not in the queue and has to wait for something before it may be admitted."""
        self._parked[request.request_id] = request

    def unpark_request(self, request: Request) -> None:
        """What the request waited for has happened: queue it."""
        self.add_request(self._parked.pop(request.request_id))

    def remove_request(self, request: Request) -> None:
        """Take a request out, wherever it is: parked, in a heap or in a list."""
        if self._parked.pop(request.request_id, None) is not None:
            return
        lane = self._lanes[request.group_index]
        self._num_ready -= 1
        self._visible_limit = -1
        if not lane.remove_from_heap(request.queue_key):
            self._delete_front(lane, bisect_left(lane.front_keys, request.queue_key))
            self._refill_front(lane)
        if not lane.front_keys:
            del self._lanes[request.group_index]
        elif len(self._lanes) > self._max_visible:  # not all are visible: take turns
            self._lanes[request.group_index] = self._lanes.pop(request.group_index)

    def count_visible(self, num_free_rows: int) -> int:
        """Requests that a policy is shown while ``num_free_rows`` could be admitted; none if none can be."""
        if not num_free_rows or not self._num_ready:
            return 0
        return min(self._max_visible, max(_MIN_VISIBLE + _VISIBLE_PER_FREE_ROW * num_free_rows, len(self._lanes)))

    def peek_requests(self, limit: int) -> list[Request]:
        """The first ``limit`` requests that may be admitted, in order; where there are groups, about as many of each,
        one group after another."""
        if not limit:
            return []
        slot_requests: list[Any] = self._slot_requests
        return [slot_requests[slot] for slot in self._visible_slots(limit)]

    def count_remaining_tokens(self, limit: int) -> NDArray[np.int64]:
        """Tokens that each of ``peek_requests(limit)`` has to compute."""
        if not limit:
            return _NONE
        self._visible_slots(limit)
        return self._columns.num_first_remaining_tokens.take(self._visible_index)

    def view_columns(
        self,
        num_remaining_tokens: NDArray[np.int64],
        count_cached_tokens: Callable[[], NDArray[np.int64]] | None = None,
    ) -> RequestColumns:
        """The requests as a policy sees them of which ``count_remaining_tokens`` told last, and what it told."""
        if not len(num_remaining_tokens):
            return self._no_columns
        return WaitingColumns(
            self._columns, self._visible_index, self._block_size, num_remaining_tokens, count_cached_tokens
        )

    def reorder_requests(self) -> None:
        """Sort anew, after every ``queue_key`` and ``group_index`` may have changed. Takes time in proportion to the
        queue's length."""
        ready = list(self._iter_ready())
        for lane in self._lanes.values():
            for index in reversed(range(len(lane.front_keys))):
                self._delete_front(lane, index)
        self._lanes.clear()
        self._num_ready, self._visible_limit = 0, -1
        for request in ready:
            self.add_request(request)

    def _iter_ready(self) -> Iterator[Request]:
        slot_requests: list[Any] = self._slot_requests
        for lane in self._lanes.values():
            yield from (slot_requests[slot] for slot in lane.front_slots)
            yield from lane.heap_requests.values()

    def _visible_slots(self, limit: int) -> list[int]:
        if limit != self._visible_limit:
            self._visible, self._visible_limit = self._gather_slots(limit), limit
            self._visible_index = np.array(self._visible, np.int64)
        return self._visible

    def _gather_slots(self, limit: int) -> list[int]:
        if len(self._lanes) == 1:
            (lane,) = self._lanes.values()
            self._fit_front(lane, self._max_visible)
            return lane.front_slots[:limit]
        if not self._lanes:
            return []
        slots: list[int] = []
        size, share = max(self._max_visible // len(self._lanes), 1), max(limit // len(self._lanes), 1)
        for lane in self._lanes.values():
            if lane.max_front != size:
                self._fit_front(lane, size)
            slots += lane.front_slots[:share]
            if len(slots) >= limit:
                break
        return slots[:limit]

    def _fit_front(self, lane: _Lane, size: int) -> None:
        """Give a lane's list the size that it has beside the other lanes now. It shrinks only as requests leave it."""
        if lane.max_front != size:
            lane.max_front = size
            self._refill_front(lane)

    def _insert_front(self, lane: _Lane, key: tuple[Any, ...], request: Request) -> None:
        if not self._free_slots:
            size = len(self._slot_requests)
            self._columns.resize_columns(2 * size)
            self._slot_requests += [None] * size
            self._free_slots += range(2 * size - 1, size - 1, -1)
        slot = self._free_slots[-1]
        self._columns.set_request(slot, request, 0, 0)  # first: where it raises, nothing has changed
        self._free_slots.pop()
        index = bisect_left(lane.front_keys, key)
        lane.front_keys.insert(index, key)
        lane.front_slots.insert(index, slot)
        self._slot_requests[slot] = request

    def _delete_front(self, lane: _Lane, index: int) -> Request:
        del lane.front_keys[index]
        slot = lane.front_slots.pop(index)
        self._free_slots.append(slot)
        request = self._slot_requests[slot]
        assert request is not None
        self._slot_requests[slot] = None
        return request

    def _refill_front(self, lane: _Lane) -> None:
        while lane.heap_requests and len(lane.front_keys) < lane.max_front:
            key = heapq.heappop(lane.heap)
            request = lane.heap_requests.pop(key, None)
            if request is not None:  # None: it was removed while it was in the heap
                self._insert_front(lane, key, request)


class _Lane:
    """The requests of one group: sorted keys with the slot of each, and a heap of keys, with the requests that are
    still there by key."""

    __slots__ = ("front_keys", "front_slots", "heap", "heap_requests", "max_front")

    def __init__(self, max_front: int) -> None:
        self.max_front = max_front
        self.front_keys: list[tuple[Any, ...]] = []
        self.front_slots: list[int] = []
        self.heap: list[tuple[Any, ...]] = []
        self.heap_requests: dict[tuple[Any, ...], Request] = {}

    def push_heap(self, key: tuple[Any, ...], request: Request) -> None:
        self.heap_requests[key] = request
        heapq.heappush(self.heap, key)

    def remove_from_heap(self, key: tuple[Any, ...]) -> bool:
        """Whether it was there. The key stays in the heap for a while."""
        if self.heap_requests.pop(key, None) is None:
            return False
        if len(self.heap) > _HEAP_SLACK + 2 * len(self.heap_requests):
            self.heap = list(self.heap_requests)
            heapq.heapify(self.heap)
        return True


class ForkGroups:
    """Requests of one prompt (``n > 1``): the children, which are parked until their parent's prompt is computed so as
    to share its blocks. True while any child waits."""

    def __init__(self, waiting: WaitingQueue, running: RunningBatch) -> None:
        self._waiting, self._running = waiting, running
        self._children: dict[int, list[Request]] = {}  # by the parent's id

    def __bool__(self) -> bool:
        return bool(self._children)

    def add_request(self, request: Request, parent: Request | None) -> None:
        """Queue a request, or park it until its parent's prompt is computed."""
        if parent is None or self._is_prompt_computed(parent):
            self._waiting.add_request(request)
        else:
            self._children.setdefault(parent.request_id, []).append(request)
            self._waiting.park_request(request)

    def unpark_children(self, parent: Request) -> None:
        """Queue the children that waited for ``parent``, in order of arrival."""
        for child in self._children.pop(parent.request_id, []):
            self._waiting.unpark_request(child)

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

    def _is_prompt_computed(self, parent: Request) -> bool:
        return parent.row >= 0 and bool(self._running.num_computed_tokens[parent.row] >= parent.prompt_len)
