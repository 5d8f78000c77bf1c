"""The running requests, as columns with stable rows: the host's twin of the worker's request table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy import RequestColumns
from quire.core.request import Request, RequestStatus
from quire.core.sched.request_columns import VIEW_FIELDS, TableColumns, describe

__all__ = ["RunningBatch"]

_PRIVATE_FIELDS = 5
_MAX_COUNTED_STOP_ID = 1 << 20
"""Stop tokens from here on share a counter."""
NEVER = np.iinfo(np.int64).max


class RunningBatch:
    """Up to ``size`` running requests. A request keeps its row from ``admit`` to ``leave``.

    ``computed`` counts tokens granted, ``landed`` those of steps that have landed, ``known`` the tokens on the host
    and in flight, ``capacity`` those its blocks have room for. Drafts in flight count as if they were right until
    they land, so these are upper bounds; ``slack`` is how much too high they may be. ``drafts`` says how many drafts
    the device holds for the next step, at most. A ``stamp`` is given at every admission, so that a step
    in flight can tell whether its row still belongs to the request it was planned for.
    """

    def __init__(self, max_num_seqs: int, block_size: int, *, has_windows: bool, prefix_caching: bool) -> None:
        self.max_num_seqs = max_num_seqs
        self.rows: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows in order of admission."""
        self._data = np.zeros((VIEW_FIELDS + _PRIVATE_FIELDS, max_num_seqs), np.int64)
        (
            self.num_computed_tokens,
            self.num_tokens,
            self.max_computed_tokens,
            self.num_in_flight_tokens,
            self.prompt_len,
            *_,
            self.num_slots,
            self.max_overcount,
        ) = self._data[:VIEW_FIELDS]
        (
            self.num_committed_tokens,
            self.cache_blocks_at,
            self.free_window_at,
            self.output_object_at,
            self.num_device_drafts,
        ) = self._data[VIEW_FIELDS:]
        self.generations = np.zeros(max_num_seqs, np.int64)
        self.requests = np.full(max_num_seqs, None, object)
        self.request_ids = np.full(max_num_seqs, None, object)
        self.token_ids = np.full(max_num_seqs, None, object)
        self._stop_token_counts = np.zeros(
            1, np.int32
        )  # (up to _STOP_IDS + 1,) running requests that stop at this token
        self._block_size = block_size
        self._first_window_free = 0 if has_windows else NEVER
        self._prefix_caching = prefix_caching
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._last_generation = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_free_rows(self) -> int:
        """Rows nobody has."""
        return len(self._free_rows)

    def add_row(self, request: Request, computed: int, capacity: int) -> int:
        """Give the request a row, with ``computed`` tokens already in the cache."""
        row = self._free_rows.pop()
        self._last_generation += 1
        self._data[:VIEW_FIELDS, row] = describe(request, computed, capacity)
        self.num_committed_tokens[row] = computed
        self.num_device_drafts[row] = 0
        self.cache_blocks_at[row] = self.next_block_boundary(computed) if self._prefix_caching else NEVER
        self.free_window_at[row] = self._first_window_free
        self.output_object_at[row] = min(request.prompt_len + 1, request.max_total_tokens)
        self.generations[row] = self._last_generation
        self.requests[row], self.request_ids[row], self.token_ids[row] = request, request.request_id, request.token_ids
        self._count_stop_tokens(request.stop_token_ids, 1)
        self.rows = np.append(self.rows, row)
        request.row, request.status = row, RequestStatus.RUNNING
        return row

    def free_row(self, request: Request) -> None:
        """Take the row back; it is announced by the next ``take_left``."""
        row = request.row
        request.num_in_flight_tokens = int(self.num_in_flight_tokens[row])
        self._count_stop_tokens(request.stop_token_ids, -1)
        self.generations[row] = 0
        self.requests[row] = self.request_ids[row] = self.token_ids[row] = None
        self.rows = self.rows[self.rows != row]
        self._free_rows.append(row)
        self._freed_rows.append(row)
        request.row = -1

    def take_freed_rows(self) -> list[int]:
        """Rows given back since the last call."""
        left, self._freed_rows = self._freed_rows, []
        return left

    def next_block_boundary(self, num_tokens: int) -> int:
        """The first multiple of the block size above ``num_tokens``."""
        return (num_tokens // self._block_size + 1) * self._block_size

    def view_columns(self, served: NDArray[np.int64]) -> RequestColumns:
        """A view for the policy, in order of admission. The rows ``served`` have nothing remaining."""
        columns = TableColumns(self._data, self.rows, self._block_size)
        if len(served):
            columns.clear_remaining(np.isin(self.rows, served))
        return columns

    def get_request(self, row: int) -> Request:
        """Who has the row."""
        found: Any = self.requests[row]
        return found

    def match_stop_tokens(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Where the token is a stop token of some running request: worth a closer look."""
        stops: NDArray[np.bool_] = self._stop_token_counts.take(tokens, mode="clip") > 0
        return stops

    def _count_stop_tokens(self, stop_ids: frozenset[int], change: int) -> None:
        for token in stop_ids:
            index = min(token, _MAX_COUNTED_STOP_ID)
            if index >= 0:
                if index + 2 > len(self._stop_token_counts):  # the last entry stands for all tokens beyond, and stays 0
                    wider = np.zeros(index + 2, np.int32)
                    wider[: len(self._stop_token_counts)] = self._stop_token_counts
                    self._stop_token_counts = wider
                self._stop_token_counts[index] += change
