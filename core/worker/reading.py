"""How far a proposer that reads every token has read, by row of the request table; on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.messages import SchedulerOutput

__all__ = ["Reading"]

_BUDGET = 512
"""Tokens that are made up for in a step: about 2 ms of a model of a billion weights on an H200."""
_Ints = NDArray[np.int64]


class Reading:
    """While nothing is drafted nothing is read. What was passed over is read in small parts once drafting is on again;
    until then a request gets no drafts."""

    def __init__(self, num_rows: int) -> None:
        self._first: _Ints = np.full(num_rows + 1, -1)  # the first token that was passed over; -1: none
        self._idle = False

    def begin(self, step: SchedulerOutput) -> bool:
        """Whether the step is to be read. Where nobody draws, what held for the step before holds."""
        self._first[[request.row for request in step.new_requests]] = -1
        if step.step >= 0 and step.samples.any():  # a rehearsal is always read
            self._idle = not step.propose
        if self._idle:
            drafts = 0 if step.drafts is None else step.drafts
            passed = step.rows[self._first[step.rows] < 0]
            self._first[passed] = (step.reached - step.num_tokens - drafts)[self._first[step.rows] < 0]
        return not self._idle

    def due(self, rows: NDArray[np.int32], reached: NDArray[np.int32]) -> tuple[NDArray[np.int32], _Ints]:
        """Of ``rows``, whose tokens up to ``reached`` are computed: those that lack nothing once the spans (3, n) of
        row, first and last + 1 are read."""
        late = np.flatnonzero(self._first[rows] >= 0)
        first = self._first[rows[late]]
        missing = reached[late] - first
        part = np.clip(_BUDGET - (missing.cumsum() - missing), 0, missing)
        self._first[rows[late]] = np.where(part < missing, first + part, -1)
        spans = np.stack((rows[late], first, first + part))[:, part > 0]
        return rows[self._first[rows] < 0], spans
