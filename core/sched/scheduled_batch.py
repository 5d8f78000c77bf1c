"""A step in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import Allocation
from quire.core.messages import BlockDiff, NewRequest
from quire.core.request import Request

__all__ = ["Draft"]


@dataclass(slots=True)
class Draft:
    """What has been granted so far, and what the worker must be told of it."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    """Drafts included."""
    drafts: list[NDArray[np.int64]] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    diffs: list[BlockDiff] = field(default_factory=list)
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(row, group, source, destination)"""
    budget_left: int = 0
    promised: int = 0
    """Part of the budget kept for drafts, which policies do not see."""
    owed: int = 0
    """Blocks that the running requests still need for what they know."""
    blocked: bool = False
    """Blocks ran out: no newcomer may be admitted any more."""
    refunded: bool = False
    """A newcomer needed less than its grant, because part of its prompt is cached."""

    def taken(self) -> NDArray[np.int64]:
        """Rows that already have their share of this step."""
        return np.concatenate(self.rows) if self.rows else np.empty(0, np.int64)

    def record(self, row: int, allocation: Allocation) -> None:
        """The row's block tables have changed."""
        for group, blocks in enumerate(allocation.new_blocks):
            if blocks:
                self.diffs.append(BlockDiff(group, row, allocation.starts[group], blocks))
        if allocation.copies:
            self.copies.extend((row, *copy) for copy in allocation.copies)

    def introduce(self, request: Request, computed: int) -> None:
        """The request enters the worker's table with ``computed`` tokens in the cache."""
        self.new_requests.append(
            NewRequest(
                row=request.row,
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                prompt_len=request.prompt_len,
                num_computed_tokens=computed,
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def scrub(self, stamps: NDArray[np.int64]) -> None:
        """Forget what was noted for requests preempted since. Their rows are free: nobody is admitted after that."""
        kept = [stamps[rows] > 0 for rows in self.rows]
        self.tokens = [tokens[keep] for tokens, keep in zip(self.tokens, kept, strict=True) if keep.any()]
        self.drafts = [drafts[keep] for drafts, keep in zip(self.drafts, kept, strict=True) if keep.any()]
        self.rows = [rows[keep] for rows, keep in zip(self.rows, kept, strict=True) if keep.any()]
        self.new_requests = [new for new in self.new_requests if stamps[new.row] > 0]
        self.diffs = [diff for diff in self.diffs if stamps[diff.row] > 0]
        self.copies = [copy for copy in self.copies if stamps[copy[0]] > 0]
