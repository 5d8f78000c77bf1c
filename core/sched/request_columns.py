"""The columns that describe a request to a policy: one layout for the running table and the waiting window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy import RequestColumns
from quire.core.request import Request

__all__ = ["VIEW_FIELDS", "TableColumns", "describe"]

VIEW_FIELDS = 10
"""computed, known, limit, in flight, prompt_len, max_tokens, priority, arrival_ns, capacity, slack: see
``describe``."""


def describe(request: Request, computed: int, capacity: int) -> tuple[int, ...]:
    """One request as a column. ``known`` counts the tokens in flight; ``limit`` is how many it will ever compute
    (its last token is never fed back); ``capacity`` is how many its blocks have room for; ``slack`` by how much
    computed and known may be too high, because drafts are in flight."""
    return (
        computed,
        len(request.token_ids) + request.num_in_flight_tokens,
        request.max_total_tokens - 1,
        request.num_in_flight_tokens,
        request.prompt_len,
        request.max_total_tokens - request.prompt_len,
        request.priority,
        request.arrival_ns,
        capacity,
        0,
    )


class TableColumns(RequestColumns):
    """Columns of the requests at ``index`` in a (VIEW_FIELDS, any) table, gathered as they are asked for."""

    def __init__(self, table: NDArray[np.int64], index: NDArray[np.int64], block_size: int) -> None:
        self._table = table
        self._index = index
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self._index)

    def clear_remaining(self, served: NDArray[np.bool_]) -> None:
        """Nothing remains of these in this step."""
        self.num_remaining_tokens = np.where(served, 0, self.num_remaining_tokens)
        self.num_remaining_tokens.flags.writeable = False

    def __getattr__(self, name: str) -> NDArray[np.int64]:
        """Only columns that were not asked for before come here."""
        if name in _STORED:
            column = self._table[_STORED[name]].take(self._index)
        elif name == "num_remaining_tokens":
            column = (
                np.minimum(self._table[1].take(self._index), self._table[2].take(self._index))
                - self.num_computed_tokens
            )
        elif name == "min_computed_tokens":
            column = self.num_computed_tokens - self._table[9].take(self._index)
        elif name == "output_len":
            column = self._table[1].take(self._index) - self.prompt_len
        elif name == "num_held_blocks":
            column = self._table[8].take(self._index) // self._block_size
        elif name == "num_needed_blocks":
            reached = self.num_computed_tokens + self.num_remaining_tokens
            column = np.maximum(-(-reached // self._block_size) - self.num_held_blocks, 0)
        else:
            raise AttributeError(name)
        column.flags.writeable = False
        setattr(self, name, column)
        return column


_STORED = {
    "num_computed_tokens": 0,
    "num_in_flight_tokens": 3,
    "prompt_len": 4,
    "max_tokens": 5,
    "priority": 6,
    "arrival_ns": 7,
}
