"""Batching policy: who runs next, and how much. Deterministic: state in, plan out; the time is in the state.

The simplest policy is one method: an ``admission_key``. The core keeps the queue in that order, runs every decoding
request each step, and fills the rest of the token budget with chunks of waiting prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchingPolicy", "Grants", "Reject", "RequestColumns", "RequestInfo", "StepView", "Usage", "default_plan"]


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What is known of a request at arrival."""

    request_id: str
    arrival_ns: int
    prompt_len: int
    max_tokens: int
    """Upper bound of the tokens it may generate."""
    priority: int
    """Lower is sooner."""
    cache_salt: str | None = None


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


class RequestColumns:
    """Requests as parallel, read-only columns; all int64 of one length.

    A column is made when it is first read, so a policy pays for those it uses. Valid until ``schedule`` returns.
    Simulators and tests make theirs with ``RequestColumns(num_computed_tokens=..., num_remaining_tokens=..., ...)``.
    """

    num_computed_tokens: NDArray[np.int64]
    """Tokens whose KV is computed or in flight: an upper bound (equal to ``min_computed_tokens`` without drafts)."""
    min_computed_tokens: NDArray[np.int64]
    num_remaining_tokens: NDArray[np.int64]
    """Known tokens still to compute; 1 for a decoding request, 0 for one that waits for its last tokens to land."""
    num_in_flight_tokens: NDArray[np.int64]
    """Tokens drawn on the device and not read back."""
    prompt_len: NDArray[np.int64]
    output_len: NDArray[np.int64]
    """Tokens generated, those in flight included."""
    max_tokens: NDArray[np.int64]
    priority: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    num_held_blocks: NDArray[np.int64]
    """What evicting it would free in each group, at most."""
    num_needed_blocks: NDArray[np.int64]
    """What computing all its remaining tokens would take in each group, at most."""

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
    """The engine at one instant. Requests are numbered: running ones 0 .. R-1, then the waiting window R .. R+W-1."""

    now_ns: int
    token_budget: int
    """Tokens this step may compute."""
    num_free_rows: int
    num_free_blocks: int
    block_size: int
    running: RequestColumns
    """In order of admission."""
    waiting: RequestColumns
    """The best of the queue in key order: at most 512, fewer when few rows are free, none when no row is."""
    chunked_prefill: bool = True
    """Whether a prompt may be granted in parts; if not, a grant below ``num_remaining_tokens`` is dropped."""


@dataclass(slots=True)
class Grants:
    """A plan, in order of service: request ``request_indices[i]`` (numbered as in the view) may compute
    ``num_scheduled_tokens[i]`` tokens.

    ``victims`` are running requests in the order in which they are preempted when blocks run out; by default the
    youngest first. The core checks everything: grants beyond the budget, the remaining tokens or the free rows are
    cut, and a request that no longer fits waits.
    """

    request_indices: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]
    victims: NDArray[np.int64] | None = None


class BatchingPolicy(ABC):
    """Chooses; the core keeps safety. A policy that raises, returns nonsense, overruns its time or never schedules is
    quarantined: ``fcfs`` takes over, a log line and a metric name it, and no request is lost.

    Given the same view and the same history, a policy returns the same plan: no clock, no I/O, seeded randomness.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def admission_key(self, request: RequestInfo) -> tuple[Any, ...] | Reject:
        """Rank in the queue, fixed at arrival; the smallest comes first. Ties keep arrival order.

        A tuple of numbers or strings, of the same length and types for every request; NaN is refused.
        """

    def schedule(self, view: StepView) -> Grants:
        """Divide the step. The default: every running request in order of admission, decodes before prompts, then
        the waiting in key order, prompts in chunks, until the budget is spent. See ``default_plan``.

        Called again within the step, with what is left, when newcomers found part of their prompt cached; requests
        already served in the step then have ``num_remaining_tokens`` 0. A policy may grant nothing while tokens
        are in flight,
        but not when the engine stands idle.
        """
        return default_plan(view)

    def request_finished(self, request: RequestInfo, usage: Usage) -> None:
        """A request left the engine."""


_PROMPTS = 1536
"""Prompt tokens of a step beside decodes, unless more than twice as many are known of: enough to fill a GPU."""


def default_plan(view: StepView) -> Grants:
    """Decodes first, then running prompts, then the waiting in order, each cut to what is left of the budget.

    Prompts end, and their first tokens leave, with their step: few share one, so that no prompt waits for one behind
    it, but half of a long queue does, which costs decodes less. Nor is a prompt cut beside another where it fits a step
    whole: begun now, it would end no sooner, and the other later.
    """
    want = view.running.num_remaining_tokens
    num_running, admitted = len(want), min(len(view.waiting), view.num_free_rows)
    if admitted:
        want = np.concatenate((want, view.waiting.num_remaining_tokens[:admitted]))
    rows = want.nonzero()[0]
    if np.count_nonzero(want[:num_running] > 1):
        decodes = rows[want[rows] == 1]
        rows = np.concatenate((decodes[decodes < num_running], rows[(want[rows] > 1) | (rows >= num_running)]))
    tokens = want[rows]
    decodes, known, budget = np.count_nonzero(want[:num_running] == 1), np.add.reduce(tokens), view.token_budget
    if decodes and view.chunked_prefill:
        budget = min(budget, decodes + max(_PROMPTS, (known - decodes) // 2))
    if known > budget:
        whole = tokens
        tokens = np.clip(budget - (tokens.cumsum() - tokens), 0, tokens)
        last = np.count_nonzero(tokens) - 1
        if last > 0 and whole[last - 1] > 1 and tokens[last] < whole[last] <= budget - decodes:
            tokens[last] = 0
        keep = tokens > 0 if view.chunked_prefill else tokens == whole
        rows, tokens = rows[keep], tokens[keep]
    return Grants(rows, tokens)
