"""Guards the engine against its batching policy: plans are checked, and a policy that misbehaves is replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy import (
    BatchingPolicy,
    Grants,
    Reject,
    RequestInfo,
    StepView,
    Usage,
)
from quire.core.errors import QueueFullError
from quire.core.plugin.quarantine import Quarantine, QuarantineReason, class_path
from quire.core.request import Request
from quire.core.sched.default_policy_plan import make_default_plan
from quire.core.stats import QuarantinedPlugin

__all__ = ["CheckedPlan", "PolicyGuard", "check_grants"]


@dataclass(slots=True)
class CheckedPlan:
    """Grants that are safe to carry out: positive, within the budget and what remains, no request twice."""

    request_indices: NDArray[np.int64]  # (n,) requests as the view numbers them
    num_scheduled_tokens: NDArray[np.int64]  # (n,)
    victims: list[int]
    """Running requests as the view numbers them, in the order in which they are preempted when blocks run out."""


class PolicyGuard:
    """Asks the policy; on its first serious fault asks ``fallback`` from then on and calls ``on_quarantine``.

    Faults: it raises; what it returns is of the wrong type or out of range; one of its methods took longer than
    ``time_limit_s``, ``max_slow_calls`` times in a row; it granted nothing ``max_empty_plans`` times in a row while the
    engine was idle. ``clock`` gives nanoseconds: a replay gives those that were recorded.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        on_quarantine: Callable[[QuarantinedPlugin], None],
        *,
        name: str | None = None,
        time_limit_s: float = 0.05,
        max_slow_calls: int = 3,
        max_empty_plans: int = 8,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.policy = policy
        self._fallback = fallback
        self._on_quarantine = on_quarantine
        self._quarantine = Quarantine(
            "policy",
            name or class_path(policy),
            self._replace_policy,
            replacement=class_path(fallback),
            time_limit_s=time_limit_s,
            max_slow_calls=max_slow_calls,
            clock=clock,
        )
        self._call: Callable[..., object] = self._quarantine.call_timed
        self._max_empty_plans, self._num_empty_plans = max_empty_plans, 0
        self._key_types: tuple[type, ...] | None = None

    def admission_key(self, request: Request) -> tuple[Any, ...]:
        """The request's place in the queue. Raises ``QueueFullError`` if the policy rejects the request."""
        info = _request_info(request)
        while True:
            policy = self.policy
            key = self._call(policy.admission_key, info)
            if self.policy is not policy:
                continue  # it raised or was too slow: the fallback is asked
            if isinstance(key, Reject) and not self._on_fallback:
                raise QueueFullError(f"request {info.request_id} was refused by the policy: {key.reason}")
            fault = self._key_fault(key)
            if fault is None:
                assert isinstance(key, tuple)
                return key
            self._report_fault("invalid_result", fault)

    def schedule(self, view: StepView) -> CheckedPlan:
        """The policy's plan for a step, checked."""
        while True:
            policy = self.policy
            # The default plan is the engine's own: neither checked nor timed.
            if type(policy).schedule is BatchingPolicy.schedule:
                grants = make_default_plan(view)
                return CheckedPlan(grants.request_indices, grants.num_scheduled_tokens, [])
            if self._on_fallback:
                result = check_grants(policy.schedule(view), view)
            else:
                returned = self._quarantine.call_timed(policy.schedule, view)
                plan_or_fault = self._quarantine.call(check_grants, returned, view)
                if plan_or_fault is None:
                    continue  # it raised or was too slow: the fallback is asked
                result = plan_or_fault
            if isinstance(result, CheckedPlan):
                return result
            self._report_fault("invalid_result", result)

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

    def request_finished(self, request: Request, clock: Callable[[], int]) -> None:
        """Tell the policy that a request left the engine, if it wants to know; ``clock`` gives nanoseconds."""
        if type(self.policy).request_finished is BatchingPolicy.request_finished:
            return
        scheduled_ns = request.first_scheduled_ns
        usage = Usage(
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            run_ns=max(clock() - scheduled_ns, 0) if scheduled_ns else 0,
        )
        self._call(self.policy.request_finished, _request_info(request), usage)

    @property
    def _on_fallback(self) -> bool:
        return self.policy is self._fallback

    def _report_fault(self, reason: QuarantineReason, detail: str) -> None:
        if self._on_fallback:
            raise RuntimeError(f"the fallback policy failed: {detail}")
        self._quarantine.switch_off(reason, detail)

    def _replace_policy(self, plugin: QuarantinedPlugin) -> None:
        self.policy = self._fallback
        self._call = _call_unguarded  # an error of the fallback is a bug of ours, and is raised
        self._key_types = None
        self._on_quarantine(plugin)

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


def _call_unguarded(function: Callable[..., object], *args: object) -> object:
    return function(*args)


def check_grants(grants: object, view: StepView) -> CheckedPlan | str:
    """The grants cut to what is possible; or, if they break the contract, a text that says how."""
    if not isinstance(grants, Grants):
        return f"schedule returned {type(grants).__name__}, not Grants"
    num_running, num_waiting = len(view.running), len(view.waiting)
    for name in ("request_indices", "num_scheduled_tokens"):
        column = getattr(grants, name)
        if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind not in "iu":
            return f"Grants.{name} is {column!r}, not a one-dimensional array of integers"
    indices = grants.request_indices.astype(np.int64, copy=False)
    tokens = grants.num_scheduled_tokens.astype(np.int64, copy=False)
    if len(indices) != len(tokens):
        return f"Grants has {len(indices)} request_indices and {len(tokens)} num_scheduled_tokens"
    if not len(indices):
        return CheckedPlan(indices, tokens, [])
    low, high = np.minimum.reduce(indices), np.maximum.reduce(indices)
    if low < 0 or high >= num_running + num_waiting:
        return f"Grants.request_indices must lie in 0..{num_running + num_waiting - 1}, got {low}..{high}"
    if np.count_nonzero(np.bincount(indices)) < len(indices):
        return f"Grants.request_indices names request {np.bincount(indices).argmax()} twice"
    if np.minimum.reduce(tokens) < 0:
        return f"Grants.num_scheduled_tokens must not be negative, got {tokens.min()}"
    victims = _check_victims(grants.victims, num_running)
    if isinstance(victims, str):
        return victims

    # From here on, what is too much is cut: to what each request has left to compute ...
    remaining = view.running.num_remaining_tokens
    if num_waiting:
        remaining = np.concatenate((remaining, view.waiting.num_remaining_tokens))
    wanted = remaining[indices]
    tokens = np.minimum(tokens, wanted)
    # ... to the waiting requests that find a row, in the order of the grants ...
    if num_waiting:
        is_waiting = indices >= num_running
        tokens = np.where(is_waiting & (np.cumsum(is_waiting & (tokens > 0)) > view.num_free_rows), 0, tokens)
    # ... to the budget, which the first grants use up ...
    if np.add.reduce(tokens) > view.token_budget:
        tokens = np.clip(view.token_budget - (tokens.cumsum() - tokens), 0, tokens)
    # ... and, where prompts cannot be computed in parts, to whole ones.
    if not view.chunked_prefill:
        tokens = np.where(tokens == wanted, tokens, 0)
    keep = tokens > 0
    if np.count_nonzero(keep) < len(keep):
        indices, tokens = indices[keep], tokens[keep]
    return CheckedPlan(indices, tokens, victims)


def _request_info(request: Request) -> RequestInfo:
    return RequestInfo(
        request_id=request.external_request_id,
        arrival_ns=request.arrival_ns,
        prompt_len=request.prompt_len,
        max_tokens=request.max_total_tokens - request.prompt_len,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def _check_victims(victims: object, num_running: int) -> list[int] | str:
    if victims is None:
        return []
    if not isinstance(victims, np.ndarray) or victims.ndim != 1 or victims.dtype.kind not in "iu":
        return f"Grants.victims is {victims!r}, not a one-dimensional array of integers"
    if len(victims) and (victims.min() < 0 or victims.max() >= num_running):
        return f"Grants.victims must lie in 0..{num_running - 1}, got {victims.min()}..{victims.max()}"
    checked: list[int] = victims.tolist()
    return checked
