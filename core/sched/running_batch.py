"""The running requests as columns with stable rows: the host's copy of what the worker's request table holds.

``StateColumns`` hold the numbers that the scheduler keeps of each request, one array per number. The running batch is
such a table, and the visible part of the waiting queue has one; ``GatheredColumns`` show a policy some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import RequestColumns, RequestInfo
from quire.core.request import Request, RequestStatus

__all__ = ["NEVER", "GatheredColumns", "RunningBatch", "StateColumns"]

NEVER = np.iinfo(np.int64).max
"""A threshold that no count reaches."""

_MAX_COUNTED_STOP_ID = 1 << 20
"""Stop tokens from this id on share a counter, so that a caller's huge id does not make the array huge."""


class StateColumns:
    """Numbers of up to ``size`` requests, each an int64 array of that length. All are rows of one matrix, so that a
    request is written with one assignment."""

    num_computed_tokens: NDArray[np.int64]
    """Tokens granted so far: their KV is computed, or will be by a step in flight. An upper bound: see
    ``max_overcount``."""
    num_tokens: NDArray[np.int64]
    """Tokens that the host knows and those that steps in flight sample. An upper bound as well."""
    max_computed_tokens: NDArray[np.int64]
    """Tokens that the request will ever compute: all but the last, which is never fed back."""
    num_in_flight_tokens: NDArray[np.int64]
    """Tokens that steps in flight sample or verify."""
    prompt_len: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    """Tokens that the request may generate."""
    priority: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    num_slots: NDArray[np.int64]
    """Tokens for which the request's blocks have room."""
    max_overcount: NDArray[np.int64]
    """Drafts in flight. They are counted as if all were accepted, so ``num_computed_tokens`` and ``num_tokens`` may be
    too high by as much as this, until the step's output is in."""
    request_ids: NDArray[np.int64]
    group: NDArray[np.int64]
    """Index of the request's group, 0 where there are none."""
    deadline_ns: NDArray[np.int64]
    ttft_target_ns: NDArray[np.int64]
    tpot_target_ns: NDArray[np.int64]
    predicted_tokens: NDArray[np.int64]

    def __init__(self, size: int) -> None:
        self._allocate(np.zeros((16, size), np.int64))

    def resize_columns(self, size: int) -> None:
        """Hold ``size`` requests, not fewer than before."""
        data = np.zeros((len(self._data), size), np.int64)
        data[:, : self._data.shape[1]] = self._data
        self._allocate(data)

    def _allocate(self, data: NDArray[np.int64]) -> None:
        self._data = data
        (
            self.num_computed_tokens,
            self.num_tokens,
            self.max_computed_tokens,
            self.num_in_flight_tokens,
            self.prompt_len,
            self.max_tokens,
            self.priority,
            self.arrival_ns,
            self.num_slots,
            self.max_overcount,
            self.request_ids,
            self.group,
            self.deadline_ns,
            self.ttft_target_ns,
            self.tpot_target_ns,
            self.predicted_tokens,
        ) = data

    def set_request(self, index: int, request: Request, num_computed_tokens: int, num_slots: int) -> None:
        """Write a request that has ``num_computed_tokens`` tokens in the cache and blocks for ``num_slots``."""
        info = request.info or _NO_INFO
        self._data[:, index] = (  # in the order of the names in ``_allocate``
            num_computed_tokens,
            len(request.token_ids) + request.num_in_flight_tokens,
            request.max_total_tokens - 1,
            request.num_in_flight_tokens,
            request.prompt_len,
            request.max_total_tokens - request.prompt_len,
            request.priority,
            request.arrival_ns,
            num_slots,
            0,
            request.request_id,
            request.group_index,
            info.deadline_ns,
            info.ttft_target_ns,
            info.tpot_target_ns,
            info.predicted_tokens,
        )


_NO_INFO = RequestInfo("", 0, 0, 0, 0)
"""Of a request of which no policy was told: in tests."""


class GatheredColumns(RequestColumns):
    """What a policy sees of the requests at ``index`` of a table: each column is gathered when it is first read.
    ``count_cached_tokens`` gives the column ``num_cached_tokens``."""

    def __init__(
        self,
        columns: StateColumns,
        index: NDArray[np.int64],
        block_size: int,
        count_cached_tokens: Callable[[], NDArray[np.int64]] | None = None,
    ) -> None:
        self._columns = columns
        self._index = index
        self._block_size = block_size
        self._count_cached_tokens = count_cached_tokens

    def __len__(self) -> int:
        return len(self._index)

    def clear_remaining(self, mask: NDArray[np.bool_]) -> None:
        """Show the requests of ``mask`` as having nothing left to compute: they are served in this step already, or
        left to others."""
        self.num_remaining_tokens = np.where(mask, 0, self.num_remaining_tokens)
        self.num_remaining_tokens.flags.writeable = False

    def __getattr__(self, name: str) -> NDArray[np.int64]:
        """Called only for columns that are not gathered yet."""
        columns, index = self._columns, self._index
        if name in _STORED:
            column: NDArray[np.int64] = getattr(columns, name).take(index)
        elif name == "num_remaining_tokens":
            known = np.minimum(columns.num_tokens.take(index), columns.max_computed_tokens.take(index))
            column = known - self.num_computed_tokens
        elif name == "min_computed_tokens":
            column = self.num_computed_tokens - columns.max_overcount.take(index)
        elif name == "output_len":
            column = columns.num_tokens.take(index) - self.prompt_len
        elif name == "request_number":
            column = columns.request_ids.take(index)
        elif name == "num_cached_tokens":
            count = self._count_cached_tokens
            column = np.zeros(len(index), np.int64) if count is None else count()
        elif name == "num_held_blocks":
            column = columns.num_slots.take(index) // self._block_size
        elif name == "num_needed_blocks":
            reached = self.num_computed_tokens + self.num_remaining_tokens
            column = np.maximum(-(-reached // self._block_size) - self.num_held_blocks, 0)
        else:
            raise AttributeError(name)
        column.flags.writeable = False
        setattr(self, name, column)  # the next read does not come here
        return column


_STORED = frozenset(
    (
        *("group", "num_computed_tokens", "num_in_flight_tokens", "prompt_len", "max_tokens"),
        *("predicted_tokens", "priority", "arrival_ns", "deadline_ns", "ttft_target_ns", "tpot_target_ns"),
    )
)
"""Columns of a policy's view that a table stores as they are."""


class RunningBatch(StateColumns):
    """Up to ``max_num_seqs`` running requests. A request keeps its row from ``add_row`` to ``free_row``; the worker's
    request table uses the same rows."""

    def __init__(self, max_num_seqs: int, block_size: int, *, has_windows: bool, prefix_caching: bool) -> None:
        super().__init__(max_num_seqs)
        self.max_num_seqs = max_num_seqs
        self.rows: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows in use, in order of admission: the oldest request first."""
        self.num_committed_tokens = np.zeros(max_num_seqs, np.int64)
        """Tokens whose KV was computed by steps whose output is in: what the prefix cache may hold."""
        self.num_device_drafts = np.zeros(max_num_seqs, np.int64)
        """Drafts that the device holds for the next step, at most."""
        self.is_held = np.zeros(max_num_seqs, bool)
        """Rows that the step being built leaves to others, which run at the same time: see ``MicroBatches``."""
        self.generations = np.zeros(max_num_seqs, np.int64)
        """A number that is new for every request that takes the row; 0 while the row is free. A step in flight
        compares it to tell whether its rows still belong to the requests that it was scheduled for."""

        # Thresholds: one comparison per step finds the few requests for which Python code has to run.
        self.cache_blocks_at = np.zeros(max_num_seqs, np.int64)
        """``num_committed_tokens`` from which there are full blocks to put into the prefix cache."""
        self.free_window_at = np.zeros(max_num_seqs, np.int64)
        """Lower bound of ``num_computed_tokens`` from which a sliding window has left a block behind."""
        self.output_object_at = np.zeros(max_num_seqs, np.int64)
        """``num_tokens`` from which the request's output needs an object: its first token, then its last."""

        self.requests = np.full(max_num_seqs, None, object)
        self.token_ids = np.full(max_num_seqs, None, object)
        """The ``token_ids`` lists of the requests, the same objects."""

        self._stop_token_counts = np.zeros(1, np.int32)  # by token id: running requests that stop at it; last entry: 0
        self._block_size = block_size
        self._first_window_free = 0 if has_windows else NEVER
        self._prefix_caching = prefix_caching
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))  # a stack: the row freed last is used first
        self._freed_rows: list[int] = []
        self._last_generation = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_free_rows(self) -> int:
        """Rows that no request has."""
        return len(self._free_rows)

    def add_row(self, request: Request, num_computed_tokens: int, num_committed_tokens: int, num_slots: int) -> int:
        """Give the request a row, with ``num_computed_tokens`` tokens in the cache and blocks for ``num_slots``. Fewer
        tokens are committed where steps in flight compute some of them, for the parent of a fork."""
        row = self._free_rows.pop()
        self._last_generation += 1
        self.set_request(row, request, num_computed_tokens, num_slots)
        self.num_committed_tokens[row] = num_committed_tokens
        self.num_device_drafts[row] = 0
        self.cache_blocks_at[row] = self.next_block_boundary(num_computed_tokens) if self._prefix_caching else NEVER
        self.free_window_at[row] = self._first_window_free
        self.output_object_at[row] = min(request.prompt_len + 1, request.max_total_tokens)
        self.generations[row] = self._last_generation
        self.requests[row], self.token_ids[row] = request, request.token_ids
        self._count_stop_tokens(request.stop_token_ids, 1)
        self.rows = np.append(self.rows, row)  # a new array: views of earlier steps keep theirs
        request.row, request.status = row, RequestStatus.RUNNING
        return row

    def free_row(self, request: Request) -> None:
        """Take the row back; the next ``take_freed_rows`` names it."""
        row = request.row
        request.num_in_flight_tokens = int(self.num_in_flight_tokens[row])
        self._count_stop_tokens(request.stop_token_ids, -1)
        self.generations[row] = 0
        self.requests[row] = self.token_ids[row] = None
        self.rows = self.rows[self.rows != row]
        self._free_rows.append(row)
        self._freed_rows.append(row)
        request.row = -1

    def take_freed_rows(self) -> list[int]:
        """Rows freed since the last call."""
        freed, self._freed_rows = self._freed_rows, []
        return freed

    def restore_freed_rows(self, rows: list[int]) -> None:
        """The step that named these rows as freed failed: the next ``take_freed_rows`` names those that are still free,
        because the worker may not have learned of them."""
        named, free = set(self._freed_rows), set(self._free_rows)
        self._freed_rows += [row for row in rows if row in free and row not in named]

    def next_block_boundary(self, num_tokens: int) -> int:
        """The first multiple of the block size above ``num_tokens``."""
        return (num_tokens // self._block_size + 1) * self._block_size

    def count_runnable(self) -> int:
        """Requests that have tokens to compute in the step that is being built, those it serves already included."""
        rows = self.rows[~self.is_held[self.rows]]
        known = np.minimum(self.num_tokens[rows], self.max_computed_tokens[rows])
        return int(np.count_nonzero(known > self.num_computed_tokens[rows]))

    def view_columns(self, scheduled_rows: NDArray[np.int64]) -> RequestColumns:
        """The batch as a policy sees it, in order of admission. Nothing remains for ``scheduled_rows``, and for those
        that are held."""
        columns = GatheredColumns(self, self.rows, self._block_size)
        is_held = self.is_held[self.rows]
        if len(scheduled_rows) or is_held.any():
            columns.clear_remaining(np.isin(self.rows, scheduled_rows) | is_held)
        return columns

    def get_request(self, row: int) -> Request:
        """The request that has the row."""
        request: Request = self.requests[row]
        return request

    def match_stop_tokens(self, token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Where a token is a stop token of some running request, not necessarily of the one that sampled it: a cheap
        test that spares most requests the exact one."""
        matches: NDArray[np.bool_] = self._stop_token_counts.take(token_ids, mode="clip") > 0
        return matches

    def _count_stop_tokens(self, stop_token_ids: frozenset[int], change: int) -> None:
        for token in stop_token_ids:
            index = min(token, _MAX_COUNTED_STOP_ID)
            if index >= 0:
                if index + 2 > len(self._stop_token_counts):
                    # ``take`` clips larger ids to the last entry, which stays 0: no running request stops at them.
                    grown = np.zeros(index + 2, np.int32)
                    grown[: len(self._stop_token_counts)] = self._stop_token_counts
                    self._stop_token_counts = grown
                self._stop_token_counts[index] += change
