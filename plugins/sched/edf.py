"""Earliest deadline first.

No order meets all deadlines of a single server if this one does not (C. L. Liu and J. W. Layland, "Scheduling
algorithms for multiprogramming in a hard-real-time environment", Journal of the ACM 20, 1973). Under overload it may
miss many, because it starts what is already late: ``drop`` refuses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.plugins.sched.step_time import StepTimeModel
from quire.sdk import NO_DEADLINE, BatchingPolicy, Grants, RequestInfo, StepReport, StepView, make_default_plan

__all__ = ["EDFPolicy"]


class EDFPolicy(BatchingPolicy):
    """By deadline; requests without one come last, in order of arrival."""

    changes_only_at_events = True

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        drop: bool = False
        """Refuse a waiting request when its deadline cannot be met even if it is admitted now."""
        default_deadline_ms: float | None = None
        """The deadline of a request that names none, from its arrival; none: never."""

        def __post_init__(self) -> None:
            if self.default_deadline_ms is not None and not 0 < self.default_deadline_ms <= 1e9:
                raise ValueError(f"default_deadline_ms must be above 0, got {self.default_deadline_ms}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._times = StepTimeModel()
        if not self.options.drop:
            self.unused_methods = frozenset({"schedule", "step_scheduled"})

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """The deadline, then the arrival."""
        default_ms = self.options.default_deadline_ms
        if request.deadline_ns == NO_DEADLINE and default_ms is not None:
            return (request.arrival_ns + int(default_ms * 1e6), request.arrival_ns)
        return (request.deadline_ns, request.arrival_ns)

    def schedule(self, view: StepView) -> Grants:
        """The default plan, without what comes too late."""
        waiting = view.waiting
        if not self.options.drop or not len(waiting):
            return make_default_plan(view)
        deadlines = waiting.deadline_ns
        if self.options.default_deadline_ms is not None:
            by_default = waiting.arrival_ns + int(self.options.default_deadline_ms * 1e6)
            deadlines = np.where(deadlines == NO_DEADLINE, by_default, deadlines)
        # The least time that it takes from here: its prompt alone, then a step for each token that is expected.
        prompt_ns = self._times.estimate_ns(1) + waiting.num_remaining_tokens * self._times.per_token_ns
        expected = np.where(waiting.predicted_tokens > 0, waiting.predicted_tokens, 1) - waiting.output_len
        needed_ns = prompt_ns + np.maximum(expected - 1, 0) * self._times.estimate_ns(1 + len(view.running))
        is_late = (view.now_ns + needed_ns > deadlines) & (waiting.output_len == 0)
        if not is_late.any():
            return make_default_plan(view)
        grants = make_default_plan(view, waiting_order=(~is_late).nonzero()[0])
        for index in is_late.nonzero()[0].tolist():
            late_ms = (view.now_ns + float(needed_ns[index]) - float(deadlines[index])) / 1e6
            grants.refuse(len(view.running) + index, f"its answer would come {late_ms:.0f} ms late")
        return grants

    def step_scheduled(self, report: StepReport) -> None:
        """Learn how long steps take."""
        self._times.record_report(report)
