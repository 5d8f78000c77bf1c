"""Requests as columns: ``StateColumns`` hold the numbers that the scheduler keeps of each, one array per number. The
running batch is such a table, and the visible part of the waiting queue has one. ``GatheredColumns`` show a policy some
rows of it: each column is gathered when it is first read, since most are read by few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import RequestColumns, RequestInfo
from quire.core.request import Request

__all__ = ["GatheredColumns", "StateColumns", "WaitingColumns", "lazy_column", "stored_column"]


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
    num_first_remaining_tokens: NDArray[np.int64]
    """Tokens that the request had left to compute when it was written: has, if it waits."""
    num_counted_tokens: NDArray[np.int64]
    """Of ``num_computed_tokens``, those that are counted as the use of the request's group."""

    def __init__(self, size: int) -> None:
        self._allocate(np.zeros((18, size), np.int64))

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
            self.num_first_remaining_tokens,
            self.num_counted_tokens,
        ) = data

    def set_request(self, index: int, request: Request, num_computed_tokens: int, num_slots: int) -> None:
        """Write a request that has ``num_computed_tokens`` tokens in the cache and blocks for ``num_slots``."""
        info = request.info or _NO_INFO
        num_tokens, max_computed_tokens = (
            len(request.token_ids) + request.num_in_flight_tokens,
            request.max_total_tokens - 1,
        )
        self._data[:, index] = (  # in the order of the names in ``_allocate``
            num_computed_tokens,
            num_tokens,
            max_computed_tokens,
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
            min(num_tokens, max_computed_tokens) - num_computed_tokens,
            num_computed_tokens,
        )


_NO_INFO = RequestInfo("", 0, 0, 0, 0)
"""Of a request of which no policy was told: in tests."""


class _LazyColumn:
    """Not ``__getattr__``, which is called after a lookup has failed and takes twice as long."""

    def __init__(self, compute: Callable[[Any], NDArray[np.int64]]) -> None:
        self._compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, columns: Any, owner: type) -> NDArray[np.int64]:
        column = self._compute(columns)
        column.setflags(write=False)
        columns.__dict__[self._name] = column  # the next read does not come here
        return column


def lazy_column(compute: Callable[[Any], NDArray[np.int64]]) -> Any:
    """Decorates a method that computes a column: it is called when the attribute is first read."""
    return _LazyColumn(compute)


class _StoredColumn(_LazyColumn):
    """One call less, since most columns that are read are of this kind."""

    def __init__(self, stored_name: str) -> None:
        self._stored_name = stored_name

    def __get__(self, columns: Any, owner: type) -> NDArray[np.int64]:
        column: NDArray[np.int64] = getattr(columns.table, self._stored_name).take(columns.index)
        column.setflags(write=False)
        columns.__dict__[self._name] = column
        return column


def stored_column(name: str) -> Any:
    """A column that the table stores as it is."""
    return _StoredColumn(name)


class GatheredColumns(RequestColumns):
    """The requests at ``index`` of a table, with ``remaining`` tokens each, of which policies see a copy."""

    def __init__(
        self, table: StateColumns, index: NDArray[np.int64], block_size: int, remaining: NDArray[np.int64]
    ) -> None:
        self.table = table
        self.index = index
        self.block_size = block_size
        self._remaining = remaining

    def __len__(self) -> int:
        return len(self.index)

    request_number = stored_column("request_ids")
    group = stored_column("group")
    num_computed_tokens = stored_column("num_computed_tokens")
    num_in_flight_tokens = stored_column("num_in_flight_tokens")
    prompt_len = stored_column("prompt_len")
    max_tokens = stored_column("max_tokens")
    predicted_tokens = stored_column("predicted_tokens")
    priority = stored_column("priority")
    arrival_ns = stored_column("arrival_ns")
    deadline_ns = stored_column("deadline_ns")
    ttft_target_ns = stored_column("ttft_target_ns")
    tpot_target_ns = stored_column("tpot_target_ns")

    @lazy_column
    def num_remaining_tokens(self) -> NDArray[np.int64]:
        """The engine plans with the original."""
        return self._remaining.copy()

    @lazy_column
    def min_computed_tokens(self) -> NDArray[np.int64]:
        """As if no draft in flight were accepted."""
        column: NDArray[np.int64] = self.num_computed_tokens - self.table.max_overcount.take(self.index)
        return column

    @lazy_column
    def output_len(self) -> NDArray[np.int64]:
        """All tokens but the prompt's."""
        return (self.table.num_tokens - self.table.prompt_len).take(self.index)

    @lazy_column
    def num_cached_tokens(self) -> NDArray[np.int64]:
        """Of requests that wait alone."""
        return np.zeros(len(self.index), np.int64)

    @lazy_column
    def num_held_blocks(self) -> NDArray[np.int64]:
        """Blocks with room for tokens."""
        return self.table.num_slots.take(self.index) // self.block_size

    @lazy_column
    def num_needed_blocks(self) -> NDArray[np.int64]:
        """Those up to the last token there is, without those held."""
        reached = self.num_computed_tokens + self.num_remaining_tokens
        column: NDArray[np.int64] = np.maximum(-(-reached // self.block_size) - self.num_held_blocks, 0)
        return column


class WaitingColumns(GatheredColumns):
    """The same of requests that wait, of which nothing is computed. ``count_cached_tokens`` looks into the prefix cache
    for the column ``num_cached_tokens``; None: the policy does not read it."""

    def __init__(
        self,
        table: StateColumns,
        index: NDArray[np.int64],
        block_size: int,
        remaining: NDArray[np.int64],
        count_cached_tokens: Callable[[], NDArray[np.int64]] | None = None,
    ) -> None:
        super().__init__(table, index, block_size, remaining)
        self._count_cached_tokens = count_cached_tokens

    @lazy_column
    def num_cached_tokens(self) -> NDArray[np.int64]:
        """Now."""
        count = self._count_cached_tokens
        return np.zeros(len(self.index), np.int64) if count is None else count()
