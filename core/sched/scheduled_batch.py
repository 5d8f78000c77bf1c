"""A step while it is being built: what has been granted, and what the worker has to be told for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import Allocation
from quire.core.messages import BlockCopy, BlockDiff, NewRequest
from quire.core.request import Request

__all__ = ["Fork", "RowCopy", "ScheduledBatch", "ScheduledRows"]


_NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)


class ScheduledRows(NamedTuple):
    """Grants to some rows of the running batch, in parallel columns."""

    rows: NDArray[np.int64]  # (n,)
    num_scheduled_tokens: NDArray[np.int64]  # (n,) drafts included
    num_draft_tokens: NDArray[np.int64]  # (n,)


class Fork(NamedTuple):
    """A request that was admitted with blocks of its parent, which steps in flight may still have to fill."""

    child: Request
    parent: Request


class RowCopy(NamedTuple):
    """A block that is copied before the step runs, and the row for which it is."""

    row: int
    copy: BlockCopy


@dataclass(slots=True)
class ScheduledBatch:
    """The grants of a step so far, with what is left of its budget."""

    token_budget: int
    """Tokens that the step may still compute, those for drafts included."""
    reserved_draft_budget: int = 0
    """Part of ``token_budget`` that is kept for drafts. Policies do not see it."""
    reserved_blocks: int = 0
    """Blocks that the running requests still need for the tokens they have. A waiting request must leave them free."""
    out_of_blocks: bool = False
    """Blocks ran out: no further waiting request is admitted in this step."""
    prefix_hit_refund: bool = False
    """A waiting request needed fewer tokens than its grant, because part of its prompt was cached."""
    groups: list[ScheduledRows] = field(default_factory=list)
    """The grants, in the order in which they were made: no row twice."""
    new_requests: list[NewRequest] = field(default_factory=list)
    block_diffs: list[BlockDiff] = field(default_factory=list)
    block_copies: list[RowCopy] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)

    @property
    def num_scheduled_rows(self) -> int:
        """How many rows have their grant."""
        return sum(len(group.rows) for group in self.groups)

    def scheduled_rows(self) -> NDArray[np.int64]:
        """Rows that have their grant of this step."""
        return np.concatenate([group.rows for group in self.groups]) if self.groups else _NO_ROWS

    def record_allocation(self, row: int, allocation: Allocation) -> None:
        """The row's block tables have changed by this."""
        for group, blocks in enumerate(allocation.new_blocks):
            if blocks:
                self.block_diffs.append(BlockDiff(group, row, allocation.starts[group], blocks))
        if allocation.copies:
            self.block_copies.extend(RowCopy(row, copy) for copy in allocation.copies)

    def add_new_request(self, request: Request, num_computed_tokens: int) -> None:
        """The request enters the worker's table with ``num_computed_tokens`` tokens in the cache."""
        self.new_requests.append(
            NewRequest(
                row=request.row,
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                prompt_len=request.prompt_len,
                num_computed_tokens=num_computed_tokens,
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
                adapter_slot=request.adapter_slot,
            )
        )

    def drop_preempted(self, generations: NDArray[np.int64]) -> None:
        """Take out what was granted to requests that were preempted after it: their rows are free (``generations`` of
        the running batch is 0), and stay free because no request is admitted after a preemption."""
        kept = []
        for group in self.groups:
            keep = generations[group.rows] > 0
            if keep.any():
                kept.append(ScheduledRows(*(column[keep] for column in group)))
        self.groups = kept
        self.new_requests = [new for new in self.new_requests if generations[new.row] > 0]
        self.block_diffs = [diff for diff in self.block_diffs if generations[diff.row] > 0]
        self.block_copies = [copy for copy in self.block_copies if generations[copy.row] > 0]
        self.forks = [fork for fork in self.forks if fork.child.row >= 0]
