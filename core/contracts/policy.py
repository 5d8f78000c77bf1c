"""Batching policy: which requests run next, and how many tokens each. Deterministic: state in, grants out; the time is
in the state.

The simplest policy is one method: an ``admission_key``. The core keeps the queue in that order, runs every decoding
request each step, and fills the rest of the token budget with chunks of waiting prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from quire.core.contracts.policy_view import Grants, Reject, RequestColumns, RequestInfo, StepView, Usage
from quire.core.sched.default_policy_plan import make_default_plan

__all__ = ["BatchingPolicy", "Grants", "Reject", "RequestColumns", "RequestInfo", "StepView", "Usage"]


class BatchingPolicy(ABC):
    """Chooses; the core keeps safety. A policy that raises, returns invalid grants, overruns its time or never
    schedules is quarantined: ``fcfs`` takes over, a log line and a metric name it, and no request is lost.

    Given the same view and the same history, a policy returns the same grants: no clock, no I/O, seeded randomness.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def admission_key(self, request: RequestInfo) -> tuple[Any, ...] | Reject:
        """The request's place in the queue, fixed at arrival; the smallest key comes first, ties keep arrival order.

        A tuple of numbers or strings, of the same length and types for every request; NaN is refused.
        """

    def schedule(self, view: StepView) -> Grants:
        """Divide the step's token budget among requests. The default: decodes first, then running prompts, then
        waiting requests in key order, prompts in chunks, until the budget is spent. A policy that changes only part
        of it calls ``super().schedule(view)``.

        Called again within the step, with the budget that is left, when waiting requests found part of their prompt
        cached; requests that are already served in the step then have ``num_remaining_tokens`` 0. A policy may grant
        nothing while tokens are in flight, but not when the engine is idle.
        """
        return make_default_plan(view)

    def request_finished(self, request: RequestInfo, usage: Usage) -> None:
        """A request left the engine: it finished, failed or was aborted, also if it never ran."""
