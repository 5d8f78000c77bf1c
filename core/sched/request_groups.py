"""The groups into which a policy divides requests: their indices, and what each has used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import GroupColumns, GroupKey

__all__ = ["MAX_IDLE_GROUPS", "GroupTable"]

MAX_IDLE_GROUPS = 1024
"""Groups without requests whose usage is remembered: clients choose names, so that there is no end of them."""


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

    def count_output_tokens(self, groups: NDArray[np.int64]) -> None:
        """A step of decodes was scheduled: one token for a request of each of ``groups``."""
        self._num_output_tokens += np.bincount(groups, minlength=len(self._num_output_tokens))

    def count_tokens(
        self,
        groups: NDArray[np.int64],
        num_scheduled_tokens: NDArray[np.int64],
        num_prompt_tokens: NDArray[np.int64],
    ) -> None:
        """A step was scheduled: requests of ``groups`` got so many tokens each, of which some are of their prompts."""
        size = len(self._num_requests)
        prompt = np.bincount(groups, num_prompt_tokens, size).astype(np.int64)
        self._num_prompt_tokens += prompt
        self._num_output_tokens += np.bincount(groups, num_scheduled_tokens, size).astype(np.int64) - prompt

    def view_columns(self, running: Callable[[], NDArray[np.int64]]) -> GroupColumns:
        """The groups as a policy sees them; ``running`` gives the group of each running request."""
        if self._shown_keys is None:
            self._shown_keys = tuple(self._keys)
        return _TableColumns(self._shown_keys, self, running)

    def gather_column(self, name: str, running: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """A column of ``GroupColumns`` by its name, now."""
        size = len(self._keys)
        if name == "num_prompt_tokens":
            return self._num_prompt_tokens[:size].copy()
        if name == "num_output_tokens":
            return self._num_output_tokens[:size].copy()
        num_running = np.bincount(running(), minlength=size)[:size]
        return num_running if name == "num_running" else self._num_requests[:size] - num_running

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

    def __init__(self, keys: Sequence[GroupKey], table: GroupTable, running: Callable[[], NDArray[np.int64]]) -> None:
        super().__init__(keys)
        self._table, self._running = table, running

    def __getattr__(self, name: str) -> NDArray[np.int64]:
        """Called only for columns that are not there yet."""
        if name not in GroupColumns.__annotations__:
            raise AttributeError(name)
        column = self._table.gather_column(name, self._running)
        column.flags.writeable = False
        setattr(self, name, column)
        return column
