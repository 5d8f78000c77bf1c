"""A step in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import Allocation
from quire.core.messages import BlockDiff, NewRequest
from quire.core.request import Request

__all__ = ["ScheduledBatch"]


@dataclass(slots=True)
class ScheduledBatch:
    """What has been granted so far, and what the worker must be told of it."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    num_scheduled_tokens: list[NDArray[np.int64]] = field(default_factory=list)
    """Drafts included."""
    num_draft_tokens: list[NDArray[np.int64]] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    block_diffs: list[BlockDiff] = field(default_factory=list)
    block_copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(row, group, source, destination)"""
    token_budget: int = 0
    reserved_draft_budget: int = 0
    """Part of the budget kept for drafts, which policies do not see."""
    reserved_blocks: int = 0
    """Blocks that the running requests still need for what they know."""
    out_of_blocks: bool = False
    """Blocks ran out: no newcomer may be admitted any more."""
    prefix_hit_refund: bool = False
    """A newcomer needed less than its grant, because part of its prompt is cached."""

    def scheduled_rows(self) -> NDArray[np.int64]:
        """Rows that already have their share of this step."""
        return np.concatenate(self.rows) if self.rows else np.empty(0, np.int64)

    def record_allocation(self, row: int, allocation: Allocation) -> None:
        """The row's block tables have changed."""
        for group, blocks in enumerate(allocation.new_blocks):
            if blocks:
                self.block_diffs.append(BlockDiff(group, row, allocation.starts[group], blocks))
        if allocation.copies:
            self.block_copies.extend((row, *copy) for copy in allocation.copies)

    def add_new_request(self, request: Request, num_computed_tokens: int) -> None:
        """The request enters the worker's table with ``computed`` tokens in the cache."""
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
            )
        )

    def drop_preempted(self, generations: NDArray[np.int64]) -> None:
        """Forget what was noted for requests preempted since. Their rows are free: nobody is admitted after that."""
        kept = [generations[rows] > 0 for rows in self.rows]
        self.num_scheduled_tokens = [
            tokens[keep] for tokens, keep in zip(self.num_scheduled_tokens, kept, strict=True) if keep.any()
        ]
        self.num_draft_tokens = [
            drafts[keep] for drafts, keep in zip(self.num_draft_tokens, kept, strict=True) if keep.any()
        ]
        self.rows = [rows[keep] for rows, keep in zip(self.rows, kept, strict=True) if keep.any()]
        self.new_requests = [new for new in self.new_requests if generations[new.row] > 0]
        self.block_diffs = [diff for diff in self.block_diffs if generations[diff.row] > 0]
        self.block_copies = [copy for copy in self.block_copies if generations[copy[0]] > 0]
