"""What a batching policy reads and returns: the view of one step, the columns of its requests, and the grants.

A module of its own so that ``quire.core.sched.default_policy_plan`` and the contract can both import it. Authors of
policies import these names from ``quire.sdk``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grants", "Reject", "RequestColumns", "RequestInfo", "StepView", "Usage"]


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What is known of a request when it arrives."""

    request_id: str
    """The caller's id. The ``n`` continuations of one request share it."""
    arrival_ns: int
    """``time.monotonic_ns``: later requests have no smaller one, also where the wall clock is set back."""
    prompt_len: int
    max_tokens: int
    """Upper bound of the tokens that it may generate."""
    priority: int
    """Lower is sooner."""
    cache_salt: str | None = None
    """Requests share cached prefixes only within one salt."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Returned instead of an admission key: the request is refused with this reason (HTTP 429)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished request consumed."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    run_ns: int
    """Nanoseconds from its first grant to its end; 0 if it never ran."""


class RequestColumns:
    """Requests as parallel, read-only columns: int64 arrays of one length, entry ``i`` for the ``i``-th request.

    A column is computed when it is first read, so a policy pays only for the columns that it uses. Columns are valid
    until ``schedule`` returns. Simulators and tests build their own with
    ``RequestColumns(num_computed_tokens=..., num_remaining_tokens=..., ...)``.
    """

    num_computed_tokens: NDArray[np.int64]
    """Tokens whose KV is computed or in flight: an upper bound (equal to ``min_computed_tokens`` without drafts)."""
    min_computed_tokens: NDArray[np.int64]
    """The same as a lower bound: as if every draft in flight were rejected."""
    num_remaining_tokens: NDArray[np.int64]
    """Tokens that exist and are still to be computed: 1 for a decoding request, the rest of the prompt for one in
    prefill, 0 for one whose last tokens are in flight."""
    num_in_flight_tokens: NDArray[np.int64]
    """Tokens sampled on the device and not yet read back."""
    prompt_len: NDArray[np.int64]
    output_len: NDArray[np.int64]
    """Tokens generated, including those in flight."""
    max_tokens: NDArray[np.int64]
    """Upper bound of the tokens that the request may generate."""
    priority: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    num_held_blocks: NDArray[np.int64]
    """Blocks that preempting the request would free in each group, at most."""
    num_needed_blocks: NDArray[np.int64]
    """Blocks that computing all its remaining tokens would take in each group, at most."""

    def __init__(self, **columns: NDArray[np.int64]) -> None:
        unknown = columns.keys() - RequestColumns.__annotations__.keys()
        if unknown:
            raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
        for name, column in columns.items():
            column.flags.writeable = False
            setattr(self, name, column)

    def __len__(self) -> int:
        return len(self.num_remaining_tokens)


@dataclass(frozen=True, slots=True)
class StepView:
    """The engine at one instant. Requests are numbered: with R running and W waiting requests in the view, the running
    ones are 0 .. R-1 and the waiting ones R .. R+W-1. ``Grants.request_indices`` uses these numbers."""

    now_ns: int
    """``time.monotonic_ns``: the clock of ``arrival_ns``."""
    token_budget: int
    """Tokens that this step may compute."""
    num_free_rows: int
    """Waiting requests that can start to run in this step, at most."""
    num_free_blocks: int
    """KV blocks that can be allocated now in the scarcest group."""
    block_size: int
    """Tokens in a KV block."""
    running: RequestColumns
    """In order of admission."""
    waiting: RequestColumns
    """The head of the queue in key order: at most 512 requests, fewer when few rows are free, none when no row is."""
    chunked_prefill: bool = True
    """Whether a prompt may be granted in parts; if not, a grant below ``num_remaining_tokens`` is dropped."""


@dataclass(slots=True)
class Grants:
    """A plan, in order of service: request ``request_indices[i]`` (numbered as in the view) may compute
    ``num_scheduled_tokens[i]`` tokens.

    ``victims`` are running requests in the order in which they are preempted when blocks run out; by default, and
    after them, the largest ``admission_key`` goes first. The running request with the smallest is never preempted. The
    core checks everything: grants beyond the budget, the remaining tokens or the free rows are cut, and a request that
    no longer fits waits.
    """

    request_indices: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]
    victims: NDArray[np.int64] | None = None
