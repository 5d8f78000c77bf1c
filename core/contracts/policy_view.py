"""What a batching policy reads and returns: requests, the view of one step, the grants, and what became of them.

A module of its own so that ``quire.core.sched.default_policy_plan`` and the contract can both import it. Authors of
policies import these names from ``quire.sdk``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NO_DEADLINE",
    "FinishedStep",
    "Grants",
    "GroupColumns",
    "GroupKey",
    "Refusal",
    "Reject",
    "RequestColumns",
    "RequestInfo",
    "StepReport",
    "StepView",
    "Usage",
]

NO_DEADLINE = np.iinfo(np.int64).max
"""The ``deadline_ns`` of a request without one: later than any other."""

GroupKey = str | int | None
"""What names a group of requests."""


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
    request_number: int = -1
    """The engine's number for this sequence, never used again: the column ``request_number`` of the view."""
    group: str | None = None
    """The name of its API key, or where keys have no names what the client calls its group; None: neither."""
    deadline_ns: int = NO_DEADLINE
    """When its answer is no longer of use, on the clock of ``arrival_ns``."""
    ttft_target_ns: int = 0
    """Time from arrival within which its first token should come; 0: not said."""
    tpot_target_ns: int = 0
    """Time that each further token should take on average; 0: not said."""
    predicted_tokens: int = 0
    """Tokens that the client expects of the answer, at most ``max_tokens``; 0: not said."""
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What else the client says: at most 16 short texts."""
    extra_args: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What it says to plugins; ``BatchingPolicy.read_arguments`` gives what is said to this one."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held when it arrived; 0 unless ``BatchingPolicy.reads_prefix_cache``."""
    prefix_hash: int = 0
    """Names the longest beginning of its prompt, in whole KV blocks, that an earlier request had too, of those that are
    remembered (some 100,000 blocks); 0: there was none, or not ``BatchingPolicy.reads_prefix_cache``."""
    adapter: str | None = None
    """The name of the LoRA adapter that it asks for; None: the base model."""


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

    request_number: NDArray[np.int64]
    """``RequestInfo.request_number``."""
    group: NDArray[np.int64]
    """Index of the request's group in the columns of ``StepView.groups``; 0 where there are no groups."""
    num_computed_tokens: NDArray[np.int64]
    """Tokens whose KV is computed or in flight: an upper bound (equal to ``min_computed_tokens`` without drafts)."""
    min_computed_tokens: NDArray[np.int64]
    """The same as a lower bound: as if every draft in flight were rejected."""
    num_remaining_tokens: NDArray[np.int64]
    """Tokens that exist and are still to be computed: 1 for a decoding request, the rest of the prompt for one in
    prefill, 0 for one whose last tokens are in flight."""
    num_in_flight_tokens: NDArray[np.int64]
    """Tokens sampled on the device and not yet read back."""
    num_cached_tokens: NDArray[np.int64]
    """Of a waiting request: tokens of it that the prefix cache holds now. 0 if it runs, and for every request unless
    ``BatchingPolicy.reads_prefix_cache``."""
    prompt_len: NDArray[np.int64]
    output_len: NDArray[np.int64]
    """Tokens generated, including those in flight."""
    max_tokens: NDArray[np.int64]
    """Upper bound of the tokens that the request may generate."""
    predicted_tokens: NDArray[np.int64]
    """Tokens that the client expects; 0: not said."""
    priority: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    deadline_ns: NDArray[np.int64]
    """When the answer is no longer of use; ``NO_DEADLINE``: not said."""
    ttft_target_ns: NDArray[np.int64]
    """Time from arrival to first token that the client asks for; 0: not said."""
    tpot_target_ns: NDArray[np.int64]
    """Time for each further token that the client asks for; 0: not said."""
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


class GroupColumns:
    """The groups of requests, by the key that ``BatchingPolicy.group_key`` gave them: parallel, read-only columns, each
    of which is computed when it is first read.

    A group keeps its index while it has requests in the engine. It is remembered for a while after that, with what it
    used; then another group may get the index.
    """

    keys: Sequence[GroupKey]
    """None where an index is free, which has no requests then (or where that is the key). The same object in every
    view until an index changes hands."""
    num_running: NDArray[np.int64]
    num_waiting: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    """Prompt tokens that were computed for the group; what the prefix cache held is not in it."""
    num_output_tokens: NDArray[np.int64]
    """Generated tokens that were computed for the group, drafts included. The last of an answer never is."""

    def __init__(self, keys: Sequence[GroupKey], **columns: NDArray[np.int64]) -> None:
        unknown = columns.keys() - GroupColumns.__annotations__.keys()
        if unknown:
            raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
        self.keys = keys
        for name, column in columns.items():
            column.flags.writeable = False
            setattr(self, name, column)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class StepView:
    """The engine at one instant. Requests are numbered: with R running and W waiting requests in the view, the running
    ones are 0 .. R-1 and the waiting ones R .. R+W-1. ``Grants.request_indices`` uses these numbers. To be read: what a
    policy writes into it has no effect."""

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
    """The head of the queue in key order: at most 512 requests, fewer when few rows are free, none when no row is.
    Where the policy has groups, the best few of each, one group after another."""
    chunked_prefill: bool = True
    """Whether a prompt may be granted in parts; if not, a grant below ``num_remaining_tokens`` is dropped."""
    step: int = 0
    """The number of the step that is planned."""
    groups: GroupColumns | None = None
    """The groups, if the policy has a ``group_key``."""


class Refusal(NamedTuple):
    """A waiting request that is not worth computing, as the view numbers it, and why."""

    request_index: int
    reason: str


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
    refusals: list[Refusal] = field(default_factory=list)
    """See ``refuse``."""

    def refuse(self, request_index: int, reason: str) -> None:
        """End a waiting request whose answer would come too late: the client gets HTTP 429, code
        ``deadline_unmeetable``, and the reason. One that has generated tokens already is not refused."""
        self.refusals.append(Refusal(request_index, reason))


@dataclass(slots=True)
class FinishedStep:
    """A step that ran."""

    step: int
    num_tokens: int
    """Tokens that it computed."""
    device_us: float
    """Microseconds on the device; 0: not measured."""
    request_numbers: NDArray[np.int64]  # (n,) requests in the step
    num_new_tokens: NDArray[np.int64]  # (n,) tokens sampled for each, accepted drafts included; 0: its prompt goes on


@dataclass(slots=True)
class StepReport:
    """What became of a plan, and what came back since the report before."""

    step: int
    """The number of the step that was just scheduled."""
    now_ns: int
    request_numbers: NDArray[np.int64]  # (n,) requests in the step
    num_scheduled_tokens: NDArray[np.int64]  # (n,) tokens that each got, drafts included
    admitted: tuple[int, ...]
    """Numbers of the requests that began to run in it."""
    preempted: tuple[int, ...]
    """Numbers of the requests that were preempted since the report before."""
    finished_steps: tuple[FinishedStep, ...]
    """Steps whose output came in since the report before, in order. Of steps that failed nothing is told."""
