"""Why requests waited: what the last requests were granted, what was missing, and which preemption hit them.

The cost of a step does not grow with its requests. Waiting is counted once for the whole queue, by what was missing; a
request notes the counts when it begins to wait and when it ends. What a step granted is kept as the step's own columns.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.messages import SchedulerOutput
from quire.core.request import Request

__all__ = ["MAX_LOGGED_REQUESTS", "MAX_LOGGED_STEPS", "RequestLog", "WaitReason"]

MAX_LOGGED_REQUESTS, MAX_LOGGED_STEPS = 10_000, 4096
_MAX_STINTS = 16
_MAX_RUNS = 64

WaitReason = Literal["rows", "blocks", "tokens", "policy", "step", "adapter"]
"""What the queue lacked after a step: free rows (``max_num_seqs``), KV blocks, the token budget of the step; nothing,
and the policy granted it nothing; or no request waited, and one that came then waits for the next plan. Or what a
single request lacked while it was out of the queue: its adapter had no slot."""

_REASONS: tuple[WaitReason, ...] = ("rows", "blocks", "tokens", "policy", "step", "adapter")
_INDEX_OF_REASON = {reason: index for index, reason in enumerate(_REASONS)}


class _LoggedStep(NamedTuple):
    step: int
    now_ns: int
    rows: NDArray[np.int32]
    num_scheduled_tokens: NDArray[np.int32]
    num_waiting: int
    reason: WaitReason


class _Stint:
    """A time in which a request had a row."""

    __slots__ = ("end_ns", "end_step", "first_step", "num_cached_tokens", "row", "start_ns")

    def __init__(self, first_step: int, start_ns: int, row: int, num_cached_tokens: int) -> None:
        self.first_step, self.start_ns, self.row = first_step, start_ns, row
        self.num_cached_tokens = num_cached_tokens
        self.end_step, self.end_ns = -1, 0  # while it runs


class _LoggedRequest:
    """What is kept of a request."""

    __slots__ = (
        *("facts", "finish_ns", "finish_reason", "num_output_tokens", "num_preemptions"),
        *("held_since_ns", "stints", "waited_ns", "waiting_since", "waits"),
    )

    def __init__(self, facts: dict[str, Any], waiting_since: list[int]) -> None:
        self.facts = facts
        self.waiting_since: list[int] | None = waiting_since
        """The counts of the queue when it began to wait; None while it does not."""
        self.held_since_ns: int | None = None
        """When it began to wait for its adapter; None while it does not."""
        self.waits: list[tuple[list[int], list[int]]] = []
        """Those counts and the ones when it ended to wait, of its last waits; the others are in ``waited_ns``."""
        self.waited_ns = [0] * len(_REASONS)
        self.stints: list[_Stint] = []
        self.num_preemptions = self.num_output_tokens = self.finish_ns = 0
        self.finish_reason = ""


class RequestLog:
    """Keeps the last ``MAX_LOGGED_REQUESTS`` requests and the last ``MAX_LOGGED_STEPS`` steps."""

    def __init__(self, max_requests: int = MAX_LOGGED_REQUESTS, max_steps: int = MAX_LOGGED_STEPS) -> None:
        self._max_requests = max_requests
        self._requests: dict[int, _LoggedRequest] = {}  # by number, in order of arrival
        self._steps: deque[tuple[Any, ...]] = deque(
            maxlen=max_steps
        )  # the fields of ``_LoggedStep``: made in each step
        self._waited_ns = [0] * len(_REASONS)  # by the queue as a whole, up to ``_counted_ns``
        self._reason, self._counted_ns = _INDEX_OF_REASON["step"], 0  # what holds since then

    def __len__(self) -> int:
        return len(self._requests)

    def request_arrived(self, request: Request, policy: str) -> None:
        """A request was queued."""
        if len(self._requests) >= self._max_requests:
            del self._requests[next(iter(self._requests))]
        info, params = request.info, request.scheduling
        facts = {
            "request_id": request.external_request_id,
            "request_number": request.request_id,
            "arrival_ns": request.arrival_ns,
            "prompt_len": request.prompt_len,
            "max_tokens": request.max_total_tokens - request.prompt_len,
            "priority": request.priority,
            "group": None if info is None else info.group,
            "adapter": None if request.adapter is None else request.adapter.name,
            "deadline_ms": params.deadline_ms,
            "policy": policy,
            "admission_key": repr(request.queue_key[0])[:200],
            "shares_prompt_of": request.parent_id,
        }
        self._requests[request.request_id] = _LoggedRequest(facts, self._count_until(request.arrival_ns))

    def request_admitted(self, request_id: int, row: int, step: int, num_cached_tokens: int, now_ns: int) -> None:
        """A request got a row."""
        logged = self._requests.get(request_id)
        if logged is None:
            return
        self._end_wait(logged, now_ns)
        if len(logged.stints) < _MAX_STINTS:
            logged.stints.append(_Stint(step, now_ns, row, num_cached_tokens))

    def request_held_back(self, request: Request, now_ns: int) -> None:
        """A request left the queue, or did not enter it, for its adapter has no slot."""
        logged = self._requests.get(request.request_id)
        if logged is not None:
            self._end_wait(logged, now_ns)
            logged.held_since_ns = now_ns

    def request_let_in(self, request: Request, now_ns: int) -> None:
        """A request that was held back is in the queue."""
        logged = self._requests.get(request.request_id)
        if logged is not None:
            _end_hold(logged, now_ns)
            logged.waiting_since = self._count_until(now_ns)

    def request_preempted(self, request: Request, step: int, now_ns: int) -> None:
        """A request lost its row, and waits again."""
        logged = self._requests.get(request.request_id)
        if logged is not None:
            _end_stint(logged, step, now_ns)
            logged.num_preemptions += 1
            logged.waiting_since = self._count_until(now_ns)

    def request_finished(self, request: Request, step: int, now_ns: int) -> None:
        """A request left the engine."""
        logged = self._requests.get(request.request_id)
        if logged is not None:
            self._end_wait(logged, now_ns)
            _end_hold(logged, now_ns)
            _end_stint(logged, step, now_ns)
            logged.finish_ns, logged.finish_reason = now_ns, request.finish_reason or ""
            logged.num_output_tokens = request.num_output_tokens

    def step_scheduled(self, step: SchedulerOutput, now_ns: int, num_waiting: int, reason: WaitReason) -> None:
        """A step was scheduled, and ``num_waiting`` requests still wait, for want of ``reason``."""
        if now_ns > self._counted_ns:
            self._waited_ns[self._reason] += now_ns - self._counted_ns if self._counted_ns else 0
            self._counted_ns = now_ns
        self._reason = _INDEX_OF_REASON[reason]
        self._steps.append((step.step, now_ns, step.rows, step.num_scheduled_tokens, num_waiting, reason))

    def find_requests(self, request_id: str, limit: int = 128) -> list[int]:
        """The numbers of the requests of a caller's id, or of an HTTP request's id, the newest first."""
        names = {request_id, *(request_id.removeprefix(prefix) for prefix in ("chatcmpl-", "cmpl-", "resp_"))}
        found = []
        for number in reversed(self._requests):
            name = self._requests[number].facts["request_id"]
            if name in names or any(each and name.startswith(f"{each}-") for each in names):
                found.append(number)
        return found[:limit]

    def explain_request(self, number: int, now_ns: int) -> dict[str, Any]:
        """Everything that is known of a request, as plain values; times in milliseconds from its arrival."""
        logged = self._requests[number]
        arrival_ns: int = logged.facts["arrival_ns"]
        waited = _add_waits(logged)
        if logged.waiting_since is not None:
            waited = _add_wait(waited, logged.waiting_since, self._count_until(now_ns))
        if logged.held_since_ns is not None:
            waited[_INDEX_OF_REASON["adapter"]] += now_ns - logged.held_since_ns

        def since(ns: int) -> float:
            return round((ns - arrival_ns) / 1e6, 3)

        facts = {name: value for name, value in logged.facts.items() if name != "arrival_ns"}
        is_waiting = logged.waiting_since is not None or logged.held_since_ns is not None
        state = logged.finish_reason or ("waiting" if is_waiting else "running")
        stints = []
        for stint in logged.stints:
            granted, num_steps, num_skipped = self._find_grants(stint)
            stints.append(
                {
                    "admitted_ms": since(stint.start_ns),
                    "first_step": stint.first_step,
                    "num_cached_tokens": stint.num_cached_tokens,
                    "left_ms": since(stint.end_ns) if stint.end_ns else None,
                    "num_steps": num_steps,
                    "num_steps_without_grant": num_skipped,
                    "grants": granted,
                }
            )
        return {
            **facts,
            "state": state,
            "age_ms": since(logged.finish_ns or now_ns),
            "waited_ms": {reason: round(ns / 1e6, 3) for reason, ns in zip(_REASONS, waited, strict=True)},
            "num_preemptions": logged.num_preemptions,
            "num_output_tokens": logged.num_output_tokens,
            "runs": stints,
        }

    def _find_grants(self, stint: _Stint) -> tuple[list[dict[str, int]], int, int]:
        """Grants of the steps that are still kept, equal ones in a row together; how many steps those are, and in how
        many it got nothing."""
        runs: list[dict[str, int]] = []
        num_steps = num_skipped = 0
        for each in map(_LoggedStep._make, self._steps):
            if each.step < stint.first_step or (stint.end_step >= 0 and each.step >= stint.end_step):
                continue
            num_steps += 1
            index = (each.rows == stint.row).nonzero()[0]
            tokens = int(each.num_scheduled_tokens[index[0]]) if len(index) else 0
            num_skipped += not tokens
            if runs and runs[-1]["num_tokens"] == tokens:
                runs[-1]["num_steps"] += 1
            elif len(runs) < _MAX_RUNS:
                runs.append({"first_step": each.step, "num_steps": 1, "num_tokens": tokens})
        return runs, num_steps, num_skipped

    def _count_until(self, now_ns: int) -> list[int]:
        """What the queue has waited until now, by reason."""
        counts = list(self._waited_ns)
        if self._counted_ns:
            counts[self._reason] += now_ns - self._counted_ns
        else:
            counts[self._reason] += now_ns  # no step yet: only differences count
        return counts

    def _end_wait(self, logged: _LoggedRequest, now_ns: int) -> None:
        if logged.waiting_since is not None:
            logged.waits.append((logged.waiting_since, self._count_until(now_ns)))
            logged.waiting_since = None
            if len(logged.waits) > _MAX_STINTS:
                logged.waited_ns = _add_waits(logged)
                logged.waits.clear()


def _add_wait(waited: list[int], since: list[int], until: list[int]) -> list[int]:
    return [total + max(end - start, 0) for total, start, end in zip(waited, since, until, strict=True)]


def _add_waits(logged: _LoggedRequest) -> list[int]:
    waited = list(logged.waited_ns)
    for since, until in logged.waits:
        waited = _add_wait(waited, since, until)
    return waited


def _end_hold(logged: _LoggedRequest, now_ns: int) -> None:
    if logged.held_since_ns is not None:
        logged.waited_ns[_INDEX_OF_REASON["adapter"]] += now_ns - logged.held_since_ns
        logged.held_since_ns = None


def _end_stint(logged: _LoggedRequest, step: int, now_ns: int) -> None:
    if logged.stints and not logged.stints[-1].end_ns:
        logged.stints[-1].end_step, logged.stints[-1].end_ns = step, now_ns
