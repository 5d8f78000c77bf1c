"""Guards the engine against its batching policy: plans are checked, and a policy that misbehaves is replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from quire.core.contracts.policy import (
    NO_DEADLINE,
    BatchingPolicy,
    GroupKey,
    Reject,
    RequestInfo,
    StepReport,
    StepView,
    Usage,
)
from quire.core.errors import PluginError, QueueFullError
from quire.core.plugin.quarantine import Quarantine, QuarantineReason, class_path
from quire.core.request import Request
from quire.core.sched.checked_plan import CheckedPlan, PlanLimits
from quire.core.sched.default_policy_plan import check_order, check_plan, fill_step
from quire.core.stats import QuarantinedPlugin

__all__ = ["PolicyGuard", "RequestRank", "make_request_info", "promises_equal_plans"]

_OPTIONAL_METHODS = frozenset({"order_waiting", "schedule", "step_scheduled", "request_finished"})
"""Those that a policy may name as unused."""


class RequestRank(NamedTuple):
    """Where a request waits."""

    key: tuple[Any, ...]
    group: GroupKey


class PolicyGuard:
    """Asks the policy; on its first serious fault asks ``fallback`` from then on and calls ``on_quarantine``.

    Faults: it raises; what it returns is of the wrong type or out of range; one of its methods took longer than
    ``time_limit_s``, ``max_slow_calls`` times in a row, or does not return within ``hang_limit_s``; it granted nothing
    ``max_empty_plans`` times in a row while the engine was idle. ``clock`` gives nanoseconds: a replay gives those that
    were recorded.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        on_quarantine: Callable[[QuarantinedPlugin], None],
        *,
        name: str | None = None,
        fallback_name: str | None = None,
        time_limit_s: float = 0.05,
        max_slow_calls: int = 3,
        hang_limit_s: float = 5.0,
        max_empty_plans: int = 8,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._fallback = fallback
        self._fallback_name = fallback_name or class_path(fallback)
        self._on_quarantine = on_quarantine
        self._time_limit_s, self._max_slow_calls, self._clock = time_limit_s, max_slow_calls, clock
        self._hang_limit_s = hang_limit_s
        self._max_empty_plans, self._num_empty_plans = max_empty_plans, 0
        self.quarantined: QuarantinedPlugin | None = None
        """The policy that was to be asked, if it was replaced for its fault."""
        self.replace_policy(policy, name)

    def replace_policy(self, policy: BatchingPolicy, name: str | None = None) -> None:
        """Ask ``policy`` from now on. Every request then needs a new rank. Raises PluginError, and changes nothing."""
        unused = policy.unused_methods
        if not isinstance(unused, Set) or not unused <= _OPTIONAL_METHODS:
            names = ", ".join(sorted(_OPTIONAL_METHODS))
            raise PluginError(f"{class_path(policy)}: unused_methods is {unused!r:.100}; make it a set of {names}")
        self._quarantine = Quarantine(
            "policy",
            name or class_path(policy),
            self._use_fallback,
            replacement=self._fallback_name,
            time_limit_s=self._time_limit_s,
            max_slow_calls=self._max_slow_calls,
            hang_limit_s=self._hang_limit_s,
            clock=self._clock,
        )
        self._use_policy(policy, self._quarantine.call_timed)
        self.quarantined = None

    @property
    def name(self) -> str:
        """The name of the policy that is asked."""
        return self._fallback_name if self._on_fallback else self._quarantine.name

    def rank_request(self, request: Request, *, may_reject: bool = True) -> RequestRank:
        """Where the request waits. Raises ``QueueFullError`` if the policy rejects the request; one that was accepted
        before (not ``may_reject``) goes first then."""
        info = request.info
        assert info is not None
        self._has_arrivals = True
        while True:
            policy = self.policy
            key = self._call(policy.admission_key, info)
            if self.policy is not policy:
                continue  # it raised or was too slow: the fallback is asked
            if isinstance(key, Reject) and not self._on_fallback:
                if may_reject:
                    raise QueueFullError(f"request {info.request_id} was refused by the policy: {key.reason}")
                return RequestRank((), None)  # () is smaller than any other key
            fault = self._key_fault(key)
            if fault is None:
                group = self._call(policy.group_key, info) if self.has_groups else None
                if self.policy is not policy:
                    continue
                if isinstance(group, str | int | None):
                    assert isinstance(key, tuple)
                    return RequestRank(key, group)
                fault = f"group_key returned {group!r:.100}, not a string, a whole number or None"
            self._report_fault("invalid_result", fault)

    def is_asked(self, has_waiting: bool) -> bool:
        """Whether the policy has a say in the next plan. The default plan is the engine's own: neither checked nor
        timed."""
        if self.has_default_plan:
            return False
        return has_waiting or self._has_arrivals or not self.orders_waiting

    def schedule(self, view: StepView, limits: PlanLimits) -> CheckedPlan | None:
        """The policy's plan for a step, checked by ``limits``. None if the policy was replaced for it: the queue is in
        another order then, and what the policy did to the view is not known, so that the fallback needs a view of its
        own."""
        policy = self.policy
        self._has_arrivals = False
        plan_or_fault = self._call(order_waiting if self.orders_waiting else schedule, policy, view, limits)
        if self.policy is not policy:
            return None  # it raised or was too slow
        if isinstance(plan_or_fault, CheckedPlan):
            return plan_or_fault
        self._report_fault("invalid_result", str(plan_or_fault))
        return None

    def note_empty_plan(self) -> bool:
        """The engine is idle, could run something, and the plan led to no step. Whether to ask again."""
        self._num_empty_plans += 1
        if self._num_empty_plans < self._max_empty_plans:
            return True
        self._num_empty_plans = 0
        if self._on_fallback:
            return False
        self._report_fault("no_progress", f"it granted nothing {self._max_empty_plans} times while the engine was idle")
        return True

    def note_progress(self) -> None:
        """A plan led to a step."""
        self._num_empty_plans = 0

    def report_step(self, report: StepReport) -> None:
        """Tell the policy what became of its plan."""
        self._call(self.policy.step_scheduled, report)

    def request_finished(self, request: Request, clock: Callable[[], int]) -> None:
        """Tell the policy that a request left the engine, if it wants to know; ``clock`` gives nanoseconds."""
        if not self._overrides("request_finished"):
            return
        scheduled_ns = request.first_scheduled_ns
        usage = Usage(
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            run_ns=max(clock() - scheduled_ns, 0) if scheduled_ns else 0,
        )
        self._call(self.policy.request_finished, request.info, usage)

    def _overrides(self, method: str) -> bool:
        policy = self.policy
        is_overridden = getattr(type(policy), method) is not getattr(BatchingPolicy, method)
        return is_overridden and method not in policy.unused_methods

    @property
    def _on_fallback(self) -> bool:
        return self.policy is self._fallback

    def _report_fault(self, reason: QuarantineReason, detail: str) -> None:
        if self._on_fallback:
            raise RuntimeError(f"the fallback policy failed: {detail}")
        self._quarantine.switch_off(reason, detail)

    def _use_fallback(self, plugin: QuarantinedPlugin) -> None:
        self.quarantined = plugin
        self._use_policy(self._fallback, _call_unguarded)  # an error of the fallback is a bug of ours, and is raised
        self._on_quarantine(plugin)

    def _use_policy(self, policy: BatchingPolicy, call: Callable[..., object]) -> None:
        self.policy = policy
        self._call = call
        self._key_types: tuple[type, ...] | None = None
        self._num_empty_plans = 0
        self._has_arrivals = False  # since the policy was asked
        self.orders_waiting = self._overrides("order_waiting") and not self._overrides("schedule")
        """Whether the engine plans by itself, but for the order in which the policy admits those that it sees."""
        self.has_default_plan = not (self._overrides("schedule") or self.orders_waiting)
        """Whether the engine plans by itself, in the policy's order."""
        self.has_groups = self._overrides("group_key") and not self.has_default_plan
        """Whether the policy divides requests into groups, and chooses between them."""
        self.changes_only_at_events = promises_equal_plans(policy)
        """Whether the policy is not asked where all that can run decode."""
        self.wants_reports = self._overrides("step_scheduled")
        """Whether the policy is told of each step."""
        self.reads_prefix_cache = bool(getattr(policy, "reads_prefix_cache", False))
        """Whether the policy wants to know what is cached of prompts."""

    def _key_fault(self, key: object) -> str | None:
        if not isinstance(key, tuple) or not all(isinstance(part, (int, float, str, np.number)) for part in key):
            return f"admission_key returned {key!r}, not a tuple of numbers or strings"
        if any(not isinstance(part, str) and math.isnan(part) for part in key):
            return f"admission_key returned {key!r}, which cannot be ordered"
        # Keys are compared with each other in the queue, so all must have the types of the first.
        types = tuple(str if isinstance(part, str) else float for part in key)
        if self._key_types is None:
            self._key_types = types
        return None if types == self._key_types else f"admission_key returned {key!r}, unlike the keys before it"


def promises_equal_plans(policy: BatchingPolicy) -> bool:
    """``changes_only_at_events`` of the policy itself or of the class that has its ``schedule``, or of one below: a
    class that overrides ``schedule`` does not inherit what another promised of its own."""
    if "changes_only_at_events" in vars(policy):
        return bool(policy.changes_only_at_events)
    for cls in type(policy).__mro__:
        if "changes_only_at_events" in vars(cls):
            return bool(policy.changes_only_at_events)
        if "schedule" in vars(cls):
            return False
    return False


def schedule(policy: BatchingPolicy, view: StepView, limits: PlanLimits) -> CheckedPlan | str:
    """Ask the policy and check its plan: what it returns may run code of its own when it is read. A fault is logged
    under this name."""
    seen = PlanLimits.of_view(view)
    return check_plan(policy.schedule(view), seen, limits)


def order_waiting(policy: BatchingPolicy, view: StepView, limits: PlanLimits) -> CheckedPlan | str:
    """Ask the policy for an order and make the plan. A fault is logged under this name."""
    order = policy.order_waiting(view)
    if order is None:
        return CheckedPlan(*fill_step(limits), [])
    first = check_order(order, limits)
    if first is None:
        return f"order_waiting returned {order!r:.200}, not an array of different indices into view.waiting"
    return CheckedPlan(*fill_step(limits, first), [])


def _call_unguarded(function: Callable[..., object], *args: object) -> object:
    return function(*args)


def make_request_info(request: Request, num_cached_tokens: int = 0, prefix_hash: int = 0) -> RequestInfo:
    """What a policy is told of a request."""
    params, max_tokens = request.scheduling, request.max_total_tokens - request.prompt_len
    return RequestInfo(
        request_id=request.external_request_id,
        arrival_ns=request.arrival_ns,
        prompt_len=request.prompt_len,
        max_tokens=max_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        request_number=request.request_id,
        group=params.group,
        deadline_ns=NO_DEADLINE if params.deadline_ms is None else request.arrival_ns + int(params.deadline_ms * 1e6),
        ttft_target_ns=int((params.ttft_target_ms or 0) * 1e6),
        tpot_target_ns=int((params.tpot_target_ms or 0) * 1e6),
        predicted_tokens=min(params.predicted_tokens or 0, max_tokens),
        tags=MappingProxyType(params.tags),
        extra_args=MappingProxyType(request.params.extra_args or {}),
        num_cached_tokens=num_cached_tokens,
        prefix_hash=prefix_hash,
        adapter=None if request.adapter is None else request.adapter.name,
    )
