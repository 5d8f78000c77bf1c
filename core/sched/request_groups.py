"""The groups into which a policy divides requests: their indices, and what each has used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import GroupColumns, GroupKey
from quire.core.sched.request_columns import StateColumns, lazy_column

__all__ = ["MAX_IDLE_GROUPS", "GroupTable"]

MAX_IDLE_GROUPS = 1024
"""Groups without requests whose usage is remembered: clients choose names, so that there is no end of them."""


class GroupTable:
    """An index for each group that has requests in the engine, and for those that had some last.

    Tokens are counted when someone looks, as what ``num_computed_tokens`` of the ``running`` requests has grown by, and
    when a request leaves its row: nothing is done in a step whose tokens no policy asks for.
    """

    def __init__(self, running: StateColumns, max_idle_groups: int = MAX_IDLE_GROUPS) -> None:
        self._running = running
        self._max_idle_groups = max_idle_groups
        self._keys: list[GroupKey] = []
        self._shown_keys: tuple[GroupKey, ...] | None = ()  # the same object in every view until a key changes
        self._index_of_key: dict[GroupKey, int] = {}
        self._idle: dict[int, None] = {}  # in the order in which they became idle
        self._free_indices: list[int] = []
        self._num_requests = np.zeros(16, np.int64)
        self._num_prompt_tokens = np.zeros(16, np.int64)
        self._num_output_tokens = np.zeros(16, np.int64)
        self._prompt_rows: set[int] = set()  # rows whose prompt may not be counted to its end
        self._is_counted = False  # since the last view was made

    def __len__(self) -> int:
        return len(self._keys)

    def add_request(self, key: GroupKey) -> int:
        """A request of the group enters the engine. The group's index."""
        index = self._index_of_key.get(key)
        if index is None:
            index = self._open_group(key)
        self._idle.pop(index, None)
        self._num_requests[index] += 1
        return index

    def remove_request(self, index: int) -> None:
        """A request of the group leaves the engine. Where too many groups are idle, the first of them is forgotten."""
        self._num_requests[index] -= 1
        if self._num_requests[index]:
            return
        self._idle[index] = None
        if len(self._idle) > self._max_idle_groups:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self._index_of_key[self._keys[oldest]]
            self._keys[oldest] = None
            self._shown_keys = None
            self._free_indices.append(oldest)

    def add_row(self, row: int) -> None:
        """A request got the row."""
        self._prompt_rows.add(row)

    def remove_row(self, row: int) -> None:
        """A request is about to leave the row."""
        self._count_row(row)
        self._prompt_rows.discard(row)

    def count_rejected_drafts(self, rows: NDArray[np.int32], num_rejected: NDArray[np.int64]) -> None:
        """Tokens of the requests at ``rows`` were computed, and are not among their ``num_computed_tokens``."""
        np.add.at(self._num_output_tokens, self._running.group[rows], num_rejected)

    def view_columns(self, num_running: NDArray[np.int64]) -> GroupColumns:
        """The groups as a policy sees them. ``num_running``: requests of each that have a row."""
        if self._shown_keys is None:
            self._shown_keys = tuple(self._keys)
        self._is_counted = False
        return _TableColumns(self._shown_keys, self, num_running)

    def count_waiting(self, num_running: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each group, requests in the engine that are not among the ``num_running`` of it."""
        size = len(self._keys)
        if len(num_running) >= size:
            return self._num_requests[:size] - num_running[:size]
        num_waiting = self._num_requests[:size].copy()
        num_waiting[: len(num_running)] -= num_running
        return num_waiting

    def num_prompt_tokens(self) -> NDArray[np.int64]:
        """Of each group, computed for it."""
        self._count_running()
        return self._num_prompt_tokens[: len(self._keys)].copy()

    def num_output_tokens(self) -> NDArray[np.int64]:
        """Of each group, computed for it."""
        self._count_running()
        return self._num_output_tokens[: len(self._keys)].copy()

    def _count_running(self) -> None:
        """Count what was computed since the last time, for all rows: those without a request have nothing new. Once for
        a view."""
        if self._is_counted:
            return
        running = self._running
        computed, counted = running.num_computed_tokens, running.num_counted_tokens
        for row in [*self._prompt_rows]:
            if self._count_row(row):
                self._prompt_rows.remove(row)
        np.add.at(self._num_output_tokens, running.group, computed - counted)
        counted[:] = computed
        self._is_counted = True

    def _count_row(self, row: int) -> bool:
        """Count the tokens of the request at ``row``. Whether its whole prompt is counted."""
        running = self._running
        computed, counted = running.num_computed_tokens.item(row), running.num_counted_tokens.item(row)
        group, num_new = running.group.item(row), computed - counted  # below 0 if drafts were rejected
        prompt_len = running.prompt_len.item(row)
        in_prompt = max(min(prompt_len - counted, num_new), 0)
        if in_prompt:
            self._num_prompt_tokens[group] += in_prompt
        if num_new != in_prompt:
            self._num_output_tokens[group] += num_new - in_prompt
        running.num_counted_tokens[row] = computed
        return computed >= prompt_len

    def _open_group(self, key: GroupKey) -> int:
        if self._free_indices:
            index = self._free_indices.pop()
            self._keys[index] = key
        else:
            index = len(self._keys)
            self._keys.append(key)
            if index == len(self._num_requests):
                columns = (self._num_requests, self._num_prompt_tokens, self._num_output_tokens)
                grown = (np.concatenate((column, np.zeros_like(column))) for column in columns)
                self._num_requests, self._num_prompt_tokens, self._num_output_tokens = grown
        self._index_of_key[key] = index
        self._shown_keys = None
        self._num_prompt_tokens[index] = self._num_output_tokens[index] = 0
        return index


class _TableColumns(GroupColumns):
    """Columns of a ``GroupTable``, each made when it is first read."""

    def __init__(self, keys: Sequence[GroupKey], table: GroupTable, num_running: NDArray[np.int64]) -> None:
        self.keys = keys
        self._table, self._num_running = table, num_running

    @lazy_column
    def num_running(self) -> NDArray[np.int64]:
        """Those that have a row."""
        num_groups, known = len(self.keys), self._num_running
        if len(known) < num_groups:
            return np.concatenate((known, np.zeros(num_groups - len(known), np.int64)))
        return known[:num_groups].copy()

    @lazy_column
    def num_waiting(self) -> NDArray[np.int64]:
        """The others."""
        return self._table.count_waiting(self._num_running)

    @lazy_column
    def num_prompt_tokens(self) -> NDArray[np.int64]:
        """So far."""
        return self._table.num_prompt_tokens()

    @lazy_column
    def num_output_tokens(self) -> NDArray[np.int64]:
        """So far."""
        return self._table.num_output_tokens()
