"""What stands between the scheduler and its policy: requests are ranked and grouped, views made, and events told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy, FinishedStep, StepReport, StepView
from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.request import Request
from quire.core.sched.checked_plan import CheckedPlan, PlanLimits
from quire.core.sched.default_policy_plan import fill_step
from quire.core.sched.policy_guard import PolicyGuard, make_request_info
from quire.core.sched.prefix_lookup import PrefixLookup
from quire.core.sched.request_groups import GroupTable
from quire.core.sched.request_log import RequestLog, WaitReason
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.scheduled_batch import ScheduledBatch
from quire.core.sched.waiting_queue import WaitingQueue
from quire.core.stats import QuarantinedPlugin

__all__ = ["PolicyRunner"]


class _ReportedStep(NamedTuple):
    """A step in flight of which the policy was told."""

    step: int
    request_numbers: NDArray[np.int64]


class PolicyRunner:
    """Serves one policy, and the next one after ``replace_policy`` or a quarantine. What a policy does not use (groups,
    the prefix cache, reports) is not prepared for it."""

    def __init__(
        self,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        names: tuple[str | None, str | None],
        *,
        config: SchedulerConfig,
        running: RunningBatch,
        waiting: WaitingQueue,
        allocator: KVAllocator,
        requests: dict[int, Request],
        clock: Callable[[], int],
        timer: Callable[[], int],
        on_quarantine: Callable[[QuarantinedPlugin], None],
        refuse: Callable[[Request, str], None],
    ) -> None:
        self._config = config
        self._running, self._waiting = running, waiting
        self._allocator = allocator
        self._requests = requests
        self._clock = clock
        self._on_quarantine = on_quarantine
        self._refuse = refuse
        self._num_arrivals = 0
        self._now_ns, self._step = 0, 0  # of the last plan
        self.log = RequestLog()
        """Why the last requests waited."""
        self._preempted: list[int] = []
        self._finished_steps: list[FinishedStep] = []
        self._reported: deque[_ReportedStep] = deque()  # in flight
        self._groups: GroupTable | None = None
        self._prefixes: PrefixLookup | None = None
        self.guard = PolicyGuard(
            policy, fallback, self._note_quarantine, name=names[0], fallback_name=names[1], clock=timer
        )
        self._prepare_policy()

    def replace_policy(self, policy: BatchingPolicy, name: str | None = None) -> None:
        """Ask ``policy`` from now on: all requests get new ranks, running ones too, because they may be preempted.
        Takes time in proportion to their number."""
        self.guard.replace_policy(policy, name)
        self._prepare_policy()
        self._rank_all_requests()

    def add_request(self, request: Request) -> None:
        """Give an arriving request its rank and group. Raises ``QueueFullError`` if the policy rejects it."""
        self._rank_request(request, self._num_arrivals, may_reject=True)
        self._num_arrivals += 1
        self.log.request_arrived(request, self.guard.name)

    def request_finished(self, request: Request) -> None:
        """A request left the engine."""
        if self._groups is not None:
            self._groups.remove_request(request.group_index)
        self.guard.request_finished(request, self._clock)
        self.log.request_finished(request, self._step, max(self._now_ns, request.arrival_ns))

    def request_preempted(self, request: Request) -> None:
        """A request lost its row."""
        if self.guard.wants_reports:
            self._preempted.append(request.request_id)
        self.log.request_preempted(request, self._step, self._now_ns)

    def make_plan(
        self, batch: ScheduledBatch, step: int, num_visible: int, waiting_requests: list[Request]
    ) -> CheckedPlan | None:
        """The policy's plan for what is left of the batch; None if it was replaced for its fault. ``waiting_requests``
        are ``peek_requests(num_visible)`` of the queue. Requests that the policy refuses are ended, unless a part of
        their answer was sent."""
        running = self._running
        self._now_ns, self._step = self._clock(), step
        limits = PlanLimits(
            running.count_remaining_tokens(batch.scheduled_rows() if batch.groups else None),
            self._waiting.count_remaining_tokens(num_visible),
            running.num_free_rows,
            batch.token_budget - batch.reserved_draft_budget,
            self._config.chunked_prefill,
        )
        num_free_blocks = self._allocator.num_free_blocks()  # also without a view: an allocator that fails says so
        if not self.guard.is_asked(num_visible > 0) or (
            self.guard.changes_only_at_events and not num_visible and self._only_decodes(limits)
        ):
            return CheckedPlan(*fill_step(limits), [])
        plan = self.guard.schedule(self._make_view(limits, num_free_blocks, waiting_requests), limits)
        if plan is None:
            return None
        for index, reason in plan.refusals:
            request = waiting_requests[index - len(running)]
            if not request.num_output_tokens:
                self._refuse(request, f"the deadline cannot be met: {reason}")
                self.guard.note_progress()
        return plan

    def explain_requests(self, request_id: str) -> list[dict[str, Any]]:
        """What is known of the requests of a caller's id; see ``RequestLog``."""
        now_ns = self._clock()
        return [self.log.explain_request(number, now_ns) for number in self.log.find_requests(request_id)]

    def step_scheduled(self, step: SchedulerOutput, batch: ScheduledBatch) -> None:
        """Log the step, and tell the policy what became of its plan, if it has a use for that."""
        self._log_step(step, batch)
        if self.guard.wants_reports:
            request_numbers = self._running.request_ids.take(step.rows)
            request_numbers.setflags(write=False)
            self._reported.append(_ReportedStep(step.step, request_numbers))
            report = StepReport(
                step.step,
                self._clock(),
                request_numbers,
                step.num_scheduled_tokens.astype(np.int64),
                tuple([new.request_id for new in step.new_requests]),
                tuple(self._preempted),
                tuple(self._finished_steps),
            )
            self._preempted.clear()
            self._finished_steps.clear()
            self.guard.report_step(report)

    def step_finished(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """A step's output is in: for the next report."""
        while self._reported and self._reported[0].step < step.step:
            self._reported.popleft()  # it failed
        if not self._reported or self._reported[0].step != step.step:
            return  # it was scheduled for another policy
        request_numbers = self._reported.popleft().request_numbers
        num_new_tokens = output.num_sampled_tokens.astype(np.int64)
        self._finished_steps.append(
            FinishedStep(step.step, step.total_num_scheduled_tokens, output.device_us, request_numbers, num_new_tokens)
        )

    def _log_step(self, step: SchedulerOutput, batch: ScheduledBatch) -> None:
        for new in step.new_requests:
            self.log.request_admitted(new.request_id, new.row, step.step, new.num_computed_tokens, self._now_ns)
        num_waiting = self._waiting.num_ready
        reason: WaitReason = "step"
        if num_waiting:
            lacks = (not self._running.num_free_rows, batch.out_of_blocks, batch.token_budget <= 0)
            reason = "rows" if lacks[0] else "blocks" if lacks[1] else "tokens" if lacks[2] else "policy"
        self.log.step_scheduled(step, self._now_ns, num_waiting, reason)

    def _make_view(self, limits: PlanLimits, num_free_blocks: int, waiting_requests: list[Request]) -> StepView:
        prefixes, groups = self._prefixes, self._groups
        return StepView(  # in the order of the fields: names take time
            self._now_ns,
            limits.token_budget,
            limits.num_free_rows,
            num_free_blocks,
            self._allocator.block_size,
            self._running.view_columns(limits.running),
            self._waiting.view_columns(
                limits.waiting, None if prefixes is None else partial(prefixes.count_cached_tokens, waiting_requests)
            ),
            limits.chunked_prefill,
            self._step,
            None if groups is None else groups.view_columns(self._running.group_sizes),
        )

    def _only_decodes(self, limits: PlanLimits) -> bool:
        """Whether the default plan grants one token to each running request with any left, and none is a prompt's."""
        running, remaining = self._running, limits.running
        if len(remaining) > limits.token_budget or (len(remaining) and remaining.item(remaining.argmax()) > 1):
            return False
        return not np.count_nonzero(running.num_tokens <= running.prompt_len)  # -1 in free rows

    def _prepare_policy(self) -> None:
        self._groups = GroupTable(self._running) if self.guard.has_groups else None
        self._running.set_groups(self._groups)
        self._prefixes = PrefixLookup(self._allocator) if self.guard.reads_prefix_cache else None
        self._preempted.clear()
        self._finished_steps.clear()
        self._reported.clear()

    def _rank_request(self, request: Request, arrival: int, *, may_reject: bool) -> None:
        if self._prefixes is None:
            request.info = request.info or make_request_info(request)
        else:
            request.info = make_request_info(request, *self._prefixes.record_arrival(request))
        rank = self.guard.rank_request(request, may_reject=may_reject)
        request.queue_key = (rank.key, arrival)
        request.group_index = 0 if self._groups is None else self._groups.add_request(rank.group)

    def _rank_all_requests(self) -> None:
        policy = self.guard.policy
        for request in self._requests.values():
            self._rank_request(request, request.queue_key[1], may_reject=False)
            if self.guard.policy is not policy:
                return  # it was quarantined meanwhile, and all were ranked again for that
        self._running.regroup_requests()
        self._waiting.reorder_requests()

    def _note_quarantine(self, plugin: QuarantinedPlugin) -> None:
        self._on_quarantine(plugin)
        self._prepare_policy()
        self._rank_all_requests()
