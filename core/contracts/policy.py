"""Batching policy: which requests run next, and how many tokens each. Deterministic: state in, grants out; the time is
in the state.

The simplest policy is one method: an ``admission_key``. The core keeps the queue in that order, runs every decoding
request each step, and fills the rest of the token budget with chunks of waiting prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import (
    NO_DEADLINE,
    FinishedStep,
    Grants,
    GroupColumns,
    GroupKey,
    Refusal,
    Reject,
    RequestColumns,
    RequestInfo,
    StepReport,
    StepView,
    Usage,
)
from quire.core.plugin.arguments import parse_arguments
from quire.core.sched.default_policy_plan import MIN_PREFILL_TOKENS, make_default_plan

__all__ = [
    "MIN_PREFILL_TOKENS",
    "NO_DEADLINE",
    "BatchingPolicy",
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
    "make_default_plan",
]


class BatchingPolicy(ABC):
    """Chooses; the core keeps safety. A policy that raises, returns invalid grants, overruns its time or never
    schedules is quarantined: ``fcfs`` takes over, a log line and a metric name it, and no request is lost.

    Given the same view and the same history, a policy returns the same grants: no clock, no I/O, seeded randomness.
    Methods that a policy does not override are not called.
    """

    Arguments: ClassVar[type[Any] | None] = None
    """A frozen dataclass of what a request may say to it in ``extra_args`` (``vllm_xargs`` over HTTP), each field with
    a default. A name that no plugin declares, and a value of another type, is refused before the request begins."""
    reads_prefix_cache: bool = False
    """True: ``num_cached_tokens`` and ``prefix_hash`` are looked up, which hashes each prompt when it arrives."""
    unused_methods: frozenset[str] = frozenset()
    """Of ``order_waiting``, ``schedule``, ``step_scheduled`` and ``request_finished``: those for which a policy has no
    use with its options. They are not called, as if its class did not override them."""
    changes_only_at_events: bool = False
    """A promise: while the same requests run, all of them decoding, and no waiting request could start, ``schedule``
    grants each its one token and names no victims, and calls that are left out change no later plan. The engine then
    leaves them out. A simulator skips the steps between two events as well, unless the policy has groups or hears of
    each step. A class that overrides ``schedule`` does not inherit the promise. A policy that has neither ``schedule``
    nor ``order_waiting`` promises it anyway."""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    def read_arguments(cls, request: RequestInfo) -> Any:
        """What a request says: an instance of ``Arguments``, with defaults for what it leaves out."""
        return parse_arguments(cls, request.extra_args)

    @abstractmethod
    def admission_key(self, request: RequestInfo) -> tuple[Any, ...] | Reject:
        """The request's place in the queue, fixed at arrival; the smallest key comes first, ties keep arrival order.
        When blocks run out, the running request with the largest is preempted first.

        A tuple of numbers or strings, of the same length and types for every request; NaN is refused. A policy that
        takes over from another under load is asked for every request in the engine, running ones included; one that it
        rejects then goes first.
        """

    def group_key(self, request: RequestInfo) -> GroupKey:
        """The request's group, fixed at arrival, asked after its admission key. Each group has a queue of its own, in
        the order of the keys, and the view shows the best few of each (of 512 groups at most), so that the policy can
        choose between groups however long one group's queue is. Only of use with ``order_waiting`` or ``schedule``."""
        return None

    def order_waiting(self, view: StepView) -> NDArray[np.int64] | None:
        """The order in which waiting requests are admitted, as indices into ``view.waiting``; what is left out waits.
        None: in key order. For policies that decide nothing else: the engine makes the default plan from its own
        numbers, which costs less than a ``schedule``. Asked while a row is free for a request that waits, and in the
        first step after a request arrived, even if no row is; not asked if the policy has a ``schedule`` of its own."""
        return None

    def schedule(self, view: StepView) -> Grants:
        """Divide the step's token budget among requests. The default is ``make_default_plan``: decodes first, then
        running prompts, then waiting requests in the order of ``order_waiting``, prompts in chunks, until the budget is
        spent. It takes options, so that a policy that changes only part of it returns ``make_default_plan(view, ...)``.

        Called again within the step, with the budget that is left, when waiting requests found part of their prompt
        cached; requests that are already served in the step then have ``num_remaining_tokens`` 0. A policy may grant
        nothing while tokens are in flight, but not when the engine is idle.
        """
        return make_default_plan(view, waiting_order=self.order_waiting(view))

    def step_scheduled(self, report: StepReport) -> None:
        """A step was scheduled: what was really granted, who was preempted, and what came back meanwhile."""

    def request_finished(self, request: RequestInfo, usage: Usage) -> None:
        """A request left the engine: it finished, failed or was aborted, also if it never ran."""
