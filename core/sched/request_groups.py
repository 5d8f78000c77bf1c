"""The groups into which a policy divides requests: their indices, and what each has used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import GroupColumns, GroupKey
from quire.core.sched.request_columns import lazy_column

__all__ = ["MAX_IDLE_GROUPS", "GroupTable"]

MAX_IDLE_GROUPS = 1024
"""Groups without requests whose usage is remembered: clients choose names, so that there is no end of them."""

_MAX_UNCOUNTED = 32
"""Steps whose tokens are added up at once where the policy does not ask for them."""


class GroupTable:
    """An index for each group that has requests in the engine, and for those that had some last."""

    def __init__(self, max_idle_groups: int = MAX_IDLE_GROUPS) -> None:
        self._max_idle_groups = max_idle_groups
        self._keys: list[GroupKey] = []
        self._shown_keys: tuple[GroupKey, ...] | None = ()  # the same object in every view until a key changes
        self._index_of_key: dict[GroupKey, int] = {}
        self._idle: dict[int, None] = {}  # in the order in which they became idle
        self._free_indices: list[int] = []
        self._num_requests = np.zeros(16, np.int64)
        self._num_prompt_tokens = np.zeros(16, np.int64)
        self._num_output_tokens = np.zeros(16, np.int64)
        self._uncounted: list[tuple[NDArray[Any], ...]] = []  # arguments of ``count_step``

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

    def count_step(
        self,
        groups: NDArray[np.int64],
        num_scheduled_tokens: NDArray[np.int32],
        num_computed_tokens: NDArray[np.int64],
        prompt_len: NDArray[np.int64],
    ) -> None:
        """Requests of ``groups`` were scheduled in a step; ``num_computed_tokens`` are theirs after it. Added up when
        someone looks."""
        self._uncounted.append((groups, num_scheduled_tokens, num_computed_tokens, prompt_len))
        if len(self._uncounted) == _MAX_UNCOUNTED:
            self._add_up()

    def view_columns(self, num_running: NDArray[np.int64]) -> GroupColumns:
        """The groups as a policy sees them. ``num_running``: requests of each that have a row."""
        if self._shown_keys is None:
            self._shown_keys = tuple(self._keys)
        return _TableColumns(self._shown_keys, self, num_running)

    def num_requests(self) -> NDArray[np.int64]:
        """Of each group, in the engine."""
        return self._num_requests[: len(self._keys)].copy()

    def num_prompt_tokens(self) -> NDArray[np.int64]:
        """Of each group, computed for it."""
        self._add_up()
        return self._num_prompt_tokens[: len(self._keys)].copy()

    def num_output_tokens(self) -> NDArray[np.int64]:
        """Of each group, computed for it."""
        self._add_up()
        return self._num_output_tokens[: len(self._keys)].copy()

    def _add_up(self) -> None:
        steps = self._uncounted
        if not steps:
            return
        columns = steps[0] if len(steps) == 1 else map(np.concatenate, zip(*steps, strict=True))
        groups, scheduled, computed, prompt_len = columns
        steps.clear()
        in_prompt = np.minimum(np.maximum(prompt_len - computed + scheduled, 0), scheduled)
        size = len(self._num_prompt_tokens)
        self._num_prompt_tokens += np.bincount(groups, in_prompt, size).astype(np.int64)
        self._num_output_tokens += np.bincount(groups, scheduled - in_prompt, size).astype(np.int64)

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
        self._add_up()  # of the group that had the index
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
        num_requests, running = self._table.num_requests(), self._num_running[: len(self.keys)]
        num_requests[: len(running)] -= running
        return num_requests

    @lazy_column
    def num_prompt_tokens(self) -> NDArray[np.int64]:
        """So far."""
        return self._table.num_prompt_tokens()

    @lazy_column
    def num_output_tokens(self) -> NDArray[np.int64]:
        """So far."""
        return self._table.num_output_tokens()
