"""How far a proposer that reads every token has read, by row of the request table; on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.messages import SchedulerOutput

__all__ = ["DraftPrefillTracker"]

_BACKFILL_TOKENS_PER_STEP = 2048
"""Tokens that are made up for in a step: 8 ms of a model of a billion weights on an H200."""
_Ints = NDArray[np.int64]


class DraftPrefillTracker:
    """While drafting does not pay prompts are not read. What was passed over is read in parts once it pays again; until
    then drafts of the request are withdrawn, which would be wrong."""

    def __init__(self, num_rows: int) -> None:
        self._first_skipped: _Ints = np.full(num_rows + 1, -1)  # the first token that was passed over; -1: none

    def add_requests(self, step: SchedulerOutput) -> None:
        """Requests enter their rows."""
        self._first_skipped[[request.row for request in step.new_requests]] = -1

    def note_skipped_step(self, step: SchedulerOutput) -> None:
        """Nobody read the step."""
        drafts = 0 if step.num_draft_tokens is None else step.num_draft_tokens
        first, known = step.max_seq_lens - step.num_scheduled_tokens - drafts, self._first_skipped[step.rows]
        self._first_skipped[step.rows] = np.where(known < 0, first, known)

    def take_backfill_spans(self, step: SchedulerOutput) -> _Ints:
        """What to read now of the requests that drew: spans (3, n) of row, first and last + 1 token."""
        rows, reached = step.rows[step.sampling_mask], step.max_seq_lens[step.sampling_mask]
        late = self._first_skipped[rows] >= 0
        rows, missing = rows[late], (reached - self._first_skipped[rows])[late]
        part = np.clip(_BACKFILL_TOKENS_PER_STEP - (missing.cumsum() - missing), 0, missing)
        first = self._first_skipped[rows]
        self._first_skipped[rows] = np.where(part < missing, first + part, -1)
        return np.stack((rows, first, first + part))[:, part > 0]

    def find_rows_behind(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of ``rows`` that still lack something."""
        return rows[self._first_skipped[rows] >= 0]
