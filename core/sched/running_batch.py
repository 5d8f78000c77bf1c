"""The running requests, as columns with stable rows: the host's twin of the worker's request table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy import RequestColumns
from quire.core.request import Request, RequestStatus
from quire.core.sched.request_columns import VIEW_FIELDS, TableColumns, describe

__all__ = ["RunningTable"]

_PRIVATE_FIELDS = 5
_STOP_IDS = 1 << 20
"""Stop tokens from here on share a counter."""
NEVER = np.iinfo(np.int64).max


class RunningTable:
    """Up to ``size`` running requests. A request keeps its row from ``admit`` to ``leave``.

    ``computed`` counts tokens granted, ``landed`` those of steps that have landed, ``known`` the tokens on the host
    and in flight, ``capacity`` those its blocks have room for. Drafts in flight count as if they were right until
    they land, so these are upper bounds; ``slack`` is how much too high they may be. ``drafts`` says how many drafts
    the device holds for the next step, at most. A ``stamp`` is given at every admission, so that a step
    in flight can tell whether its row still belongs to the request it was planned for.
    """

    def __init__(self, size: int, block_size: int, *, trims: bool, stores: bool) -> None:
        self.size = size
        self.order: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows in order of admission."""
        self._data = np.zeros((VIEW_FIELDS + _PRIVATE_FIELDS, size), np.int64)
        self.computed, self.known, self.limit, self.in_flight, self.prompt_len, *_, self.capacity, self.slack = (
            self._data[:VIEW_FIELDS]
        )
        self.landed, self.next_store, self.next_trim, self.next_event, self.drafts = self._data[VIEW_FIELDS:]
        self.stamps = np.zeros(size, np.int64)
        self.requests = np.full(size, None, object)
        self.ids = np.full(size, None, object)
        self.tokens = np.full(size, None, object)
        self._stop_users = np.zeros(1, np.int32)  # (up to _STOP_IDS + 1,) running requests that stop at this token
        self._block_size = block_size
        self._first_trim = 0 if trims else NEVER
        self._stores = stores
        self._free = list(range(size - 1, -1, -1))
        self._left: list[int] = []
        self._stamp = 0

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_free(self) -> int:
        """Rows nobody has."""
        return len(self._free)

    def admit(self, request: Request, computed: int, capacity: int) -> int:
        """Give the request a row, with ``computed`` tokens already in the cache."""
        row = self._free.pop()
        self._stamp += 1
        self._data[:VIEW_FIELDS, row] = describe(request, computed, capacity)
        self.landed[row] = computed
        self.drafts[row] = 0
        self.next_store[row] = self.block_end(computed) if self._stores else NEVER
        self.next_trim[row] = self._first_trim
        self.next_event[row] = min(request.prompt_len + 1, request.max_total_tokens)
        self.stamps[row] = self._stamp
        self.requests[row], self.ids[row], self.tokens[row] = request, request.request_id, request.token_ids
        self._count_stops(request.stop_token_ids, 1)
        self.order = np.append(self.order, row)
        request.row, request.status = row, RequestStatus.RUNNING
        return row

    def leave(self, request: Request) -> None:
        """Take the row back; it is announced by the next ``take_left``."""
        row = request.row
        request.num_in_flight_tokens = int(self.in_flight[row])
        self._count_stops(request.stop_token_ids, -1)
        self.stamps[row] = 0
        self.requests[row] = self.ids[row] = self.tokens[row] = None
        self.order = self.order[self.order != row]
        self._free.append(row)
        self._left.append(row)
        request.row = -1

    def take_left(self) -> list[int]:
        """Rows given back since the last call."""
        left, self._left = self._left, []
        return left

    def block_end(self, num_tokens: int) -> int:
        """The first multiple of the block size above ``num_tokens``."""
        return (num_tokens // self._block_size + 1) * self._block_size

    def view(self, served: NDArray[np.int64]) -> RequestColumns:
        """A view for the policy, in order of admission. The rows ``served`` have nothing remaining."""
        columns = TableColumns(self._data, self.order, self._block_size)
        if len(served):
            columns.serve(np.isin(self.order, served))
        return columns

    def request(self, row: int) -> Request:
        """Who has the row."""
        found: Any = self.requests[row]
        return found

    def may_stop(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Where the token is a stop token of some running request: worth a closer look."""
        stops: NDArray[np.bool_] = self._stop_users.take(tokens, mode="clip") > 0
        return stops

    def _count_stops(self, stop_ids: frozenset[int], change: int) -> None:
        for token in stop_ids:
            index = min(token, _STOP_IDS)
            if index >= 0:
                if index + 2 > len(self._stop_users):  # the last entry stands for all tokens beyond, and stays 0
                    wider = np.zeros(index + 2, np.int32)
                    wider[: len(self._stop_users)] = self._stop_users
                    self._stop_users = wider
                self._stop_users[index] += change
