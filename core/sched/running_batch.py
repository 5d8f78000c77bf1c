"""The running requests as columns with stable rows: the host's copy of what the worker's request table holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import RequestColumns
from quire.core.request import Request, RequestStatus
from quire.core.sched.request_columns import GatheredColumns, StateColumns
from quire.core.sched.request_groups import GroupTable

__all__ = ["NEVER", "RunningBatch"]

NEVER = np.iinfo(np.int64).max
"""A threshold that no count reaches."""

_MAX_COUNTED_STOP_ID = 1 << 20
"""Stop tokens from this id on share a counter, so that a caller's huge id does not make the array huge."""


class RunningBatch(StateColumns):
    """Up to ``max_num_seqs`` running requests. A request keeps its row from ``add_row`` to ``free_row``; the worker's
    request table uses the same rows."""

    def __init__(self, max_num_seqs: int, block_size: int, *, has_windows: bool, prefix_caching: bool) -> None:
        super().__init__(max_num_seqs)
        self.prompt_len.fill(-1)
        self.max_num_seqs = max_num_seqs
        self.group_sizes = np.zeros(16, np.int64)
        """How many of the requests are of each group, by its index; groups beyond the end have none."""
        self.groups: GroupTable | None = None
        """Told when tokens that it may not have counted leave ``num_computed_tokens``."""
        self.rows: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows in use, in order of admission: the oldest request first."""
        self.num_committed_tokens = np.zeros(max_num_seqs, np.int64)
        """Tokens whose KV was computed by steps whose output is in: what the prefix cache may hold."""
        self.num_device_drafts = np.zeros(max_num_seqs, np.int64)
        """Drafts that the device holds for the next step, at most."""
        self.is_held = np.zeros(max_num_seqs, bool)
        """Rows that the step being built leaves to others, which run at the same time: see ``MicroBatches``."""
        self.has_stages = False
        """Whether rows are ever held."""
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
        self._new_rows: set[int] = set()  # since the last ``take_freed_rows``: the worker has not heard of them
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
        self._new_rows.add(row)
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
        self._count_group(request.group_index)
        if self.groups is not None:
            self.groups.add_row(row)
        self.rows = np.append(self.rows, row)  # a new array: views of earlier steps keep theirs
        request.row, request.status = row, RequestStatus.RUNNING
        return row

    def free_row(self, request: Request) -> None:
        """Take the row back; the next ``take_freed_rows`` names it, unless it was given away since the last."""
        row = request.row
        if self.groups is not None:
            self.groups.remove_row(row)
        request.num_in_flight_tokens = int(self.num_in_flight_tokens[row])
        self._count_stop_tokens(request.stop_token_ids, -1)
        self.group_sizes[self.group.item(row)] -= 1
        self.generations[row] = 0
        self.prompt_len[row] = -1  # so that whole columns can be compared
        self.requests[row] = self.token_ids[row] = None
        self.rows = self.rows[self.rows != row]
        self._free_rows.append(row)
        if row in self._new_rows:  # it is as free as before, for the worker
            self._new_rows.remove(row)
        else:
            self._freed_rows.append(row)
        request.row = -1

    def set_groups(self, groups: GroupTable | None) -> None:
        """Count tokens from now on for these. Every request needs a group of theirs: ``regroup_requests``."""
        self.groups = groups
        self.group.fill(0)
        self.num_counted_tokens[:] = self.num_computed_tokens
        if groups is not None:
            for row in self.rows.tolist():
                groups.add_row(row)

    def regroup_requests(self) -> None:
        """The ``group_index`` of every request may have changed."""
        indices = [request.group_index for request in self.requests[self.rows].tolist()]
        self.group[self.rows] = indices
        self.group_sizes.fill(0)
        for index in indices:
            self._count_group(index)

    def take_freed_rows(self) -> list[int]:
        """Rows freed since the last call, of those that had requests then."""
        freed, self._freed_rows = self._freed_rows, []
        self._new_rows.clear()
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

    def count_remaining_tokens(self, scheduled_rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens that each request has left to compute, in order of admission: none for ``scheduled_rows``, which have
        their part of the step already, and for those that are held."""
        # Of the whole table, then gathered once: less work than three columns gathered.
        remaining = np.minimum(self.num_tokens, self.max_computed_tokens)
        remaining -= self.num_computed_tokens
        remaining = remaining.take(self.rows)
        if scheduled_rows is not None:
            remaining[np.isin(self.rows, scheduled_rows)] = 0
        if self.has_stages:
            remaining[self.is_held[self.rows]] = 0
        return remaining

    def view_columns(self, num_remaining_tokens: NDArray[np.int64]) -> RequestColumns:
        """The batch as a policy sees it, in order of admission, with these as what remains."""
        return GatheredColumns(self, self.rows, self._block_size, num_remaining_tokens)

    def get_request(self, row: int) -> Request:
        """The request that has the row."""
        request: Request = self.requests[row]
        return request

    def match_stop_tokens(self, token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Where a token is a stop token of some running request, not necessarily of the one that sampled it: a cheap
        test that spares most requests the exact one."""
        matches: NDArray[np.bool_] = self._stop_token_counts.take(token_ids, mode="clip") > 0
        return matches

    def _count_group(self, index: int) -> None:
        while index >= len(self.group_sizes):
            self.group_sizes = np.concatenate((self.group_sizes, np.zeros_like(self.group_sizes)))
        self.group_sizes[index] += 1

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
