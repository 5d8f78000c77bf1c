"""The scheduler: asks the policy for a plan, makes it safe and real, and books what comes back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy, RequestInfo, StepView, Usage
from quire.core.contracts.spec_decode import HostProposer
from quire.core.errors import InvalidRequestError
from quire.core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    ModelRunnerOutput,
    SchedulerOutput,
)
from quire.core.request import Request, RequestStatus
from quire.core.sched.batch_builder import BatchBuilder
from quire.core.sched.draft_length import DraftLengthTuner
from quire.core.sched.fork_group import ForkGroups
from quire.core.sched.limits import RequestLimits
from quire.core.sched.output_updater import InFlightStep, OutputUpdater
from quire.core.sched.policy_guard import PolicyGuard
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.scheduled_batch import ScheduledBatch
from quire.core.sched.speculation import Speculation
from quire.core.sched.token_budget import TokenBudget
from quire.core.sched.waiting_queue import MAX_VISIBLE, WaitingQueue

__all__ = ["Scheduler"]


class Scheduler:
    """Decides what each step computes. It never waits for a sampled token: a token drawn and not read back counts as
    known, since the worker feeds it back by itself. Several steps may be in flight; they are committed in order.

    A request waits (in the queue, or parked until its parent's prompt is computed or its own tokens have landed),
    runs (it has a row), and ends. Steps in flight remember whose rows they used, so it may leave at any moment.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        allocator: KVAllocator,
        policy: BatchingPolicy,
        *,
        fallback: BatchingPolicy,
        max_model_len: int,
        clock: Callable[[], int] = time.time_ns,
        speculation: SpeculationConfig | None = None,
        proposer: HostProposer | None = None,
    ) -> None:
        most_drafts = 0 if speculation is None else speculation.num_speculative_tokens
        self._limits = RequestLimits(config, allocator, max_model_len, most_drafts)
        self._config = config
        self._allocator = allocator
        self._clock = clock
        self._running = RunningBatch(
            config.max_num_seqs,
            allocator.block_size,
            has_windows=any(group.window is not None for group in allocator.groups),
            prefix_caching=allocator.prefix_caching,
        )
        self._waiting = WaitingQueue(allocator.block_size)
        self._requests: dict[str, Request] = {}
        self._fork_groups = ForkGroups()
        self._in_flight: deque[InFlightStep] = deque()
        self._policy_guard = PolicyGuard(policy, fallback, self._rekey_requests)
        self._speculation: Speculation | None = None
        if speculation is not None:
            pace = DraftLengthTuner(
                speculation.num_speculative_tokens, config.max_num_seqs, speculation.adaptive, proposer is None
            )
            self._speculation = Speculation(speculation, self._running, pace, proposer)
        self._output_updater = OutputUpdater(
            self._running, allocator, self._finish_request, self._waiting.unpark_request, self._speculation
        )
        self._batch_builder = BatchBuilder(
            self._running,
            self._waiting,
            allocator,
            watermark=int(cache.watermark * (allocator.num_blocks - 1)),
            preempt=self._preempt_request,
            requests=self._requests,
            clock=clock,
            speculation=self._speculation,
        )
        self._token_budget = TokenBudget(config, max_model_len)
        self._num_arrivals = self._num_steps = self._num_preemptions = 0

    # ---- requests come and go

    def add_request(self, message: EngineCoreRequest) -> None:
        """Queue a request. Raises ``InvalidRequestError`` if it can never run, ``QueueFullError`` if not now."""
        if message.request_id in self._requests:
            raise InvalidRequestError(f"request id {message.request_id!r} is already in use; choose another")
        request = self._limits.validate_request(message, self.num_waiting)
        request.queue_key = (self._policy_guard.admission_key(_request_info(request)), self._num_arrivals)
        self._num_arrivals += 1
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = []
        self._requests[request.request_id] = request
        parent = self._requests.get(request.parent_id or "")
        if parent is not None and not self._is_prompt_computed(parent):
            self._fork_groups.add_child(request)
            self._waiting.park_request(request)
        else:
            self._waiting.add_request(request)

    def abort_request(self, request_id: str) -> bool:
        """End a request now: its blocks and its row are free when this returns, whatever is in flight is dropped.
        False if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish_request(request, "abort", None)
        return True

    # ---- steps

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if nothing can run before a commit (or at all)."""
        while True:
            draft = ScheduledBatch(token_budget=self._token_budget.num_tokens)
            if self._speculation is not None:
                draft.reserved_draft_budget = self._speculation.plan_drafts(self._draft_budget())
            self._fill_batch(draft)
            if draft.rows:
                self._policy_guard.note_progress()
                return self._close_batch(draft)
            if (
                self._in_flight
                or not (len(self._running) or self._waiting.num_ready)
                or not self._policy_guard.note_empty_plan()
            ):
                return None

    def update_from_output(self, step: SchedulerOutput, result: ModelRunnerOutput) -> EngineCoreOutputs:
        """Book the result of the oldest step in flight."""
        self._token_budget.record_fitting_step()
        return self._output_updater.update_from_output(self._pop_oldest_step(step), result)

    def fail_step(self, step: SchedulerOutput, error: str) -> EngineCoreOutputs:
        """The oldest step in flight failed on the worker: its requests end with ``error``; the others go on."""
        outputs = []
        for request in self._pop_oldest_step(step).requests:
            if request.status is not RequestStatus.FINISHED:
                self._finish_request(request, "error", None)
                outputs.append(EngineCoreOutput(request.request_id, [], finish_reason="error", error=error))
        return EngineCoreOutputs(outputs)

    def retract_step(self, step: SchedulerOutput) -> bool:
        """The newest step in flight did not fit into the device's memory and left no trace there. Its requests go back
        to the queue, to be computed again in smaller steps, and keep every token. False, and nothing changes, if steps
        cannot get smaller."""
        if not self._token_budget.shrink_budget(step.total_num_scheduled_tokens):
            return False
        flight = self._in_flight.pop()
        assert flight.step is step, f"step {step.step} is not the newest in flight, {flight.step.step} is"
        drawn = step.sampling_mask.astype(np.int64) + (0 if step.num_draft_tokens is None else step.num_draft_tokens)
        self._running.num_in_flight_tokens[step.rows] -= drawn
        for request in flight.requests:
            self._preempt_request(request)
        return True

    def disable_speculation(self) -> None:
        """The proposer failed."""
        if self._speculation is not None:
            self._speculation.disable_drafting()

    # ---- figures

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, ready or not."""
        return len(self._waiting)

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        kv = self._allocator.stats()
        return {
            "num_requests_running": float(self.num_running),
            "num_requests_waiting": float(self.num_waiting),
            "kv_cache_usage_perc": 1.0 - kv.num_free / max(kv.num_blocks, 1),
            "num_preemptions_total": float(self._num_preemptions),
            "prefix_cache_queries_total": float(kv.prefix_queries),
            "prefix_cache_hits_total": float(kv.prefix_hits),
            "prompt_tokens_total": float(self._output_updater.num_prompt_tokens),
            "generation_tokens_total": float(self._output_updater.num_generation_tokens),
            "steps_total": float(self._num_steps),
            "out_of_memory_total": float(self._token_budget.num_shrinks),
            "policy_quarantines_total": float(self._policy_guard.num_quarantines),
            **({} if self._speculation is None else self._speculation.stats()),
        }

    # ---- a step in the making

    def _fill_batch(self, batch: ScheduledBatch) -> None:
        """Plan and realise; again with what is left, as long as cached prefixes give budget back."""
        table, queue = self._running, self._waiting
        while True:
            batch.prefix_hit_refund = False
            rows_free = 0 if batch.out_of_blocks else min(table.num_free_rows, queue.num_ready)
            shown = min(MAX_VISIBLE, 32 + 4 * table.num_free_rows) if rows_free else 0
            order, window = table.rows, queue.peek_requests(shown)
            if not len(order) and not window:
                return
            plan = self._policy_guard.schedule(self._make_view(batch, shown))
            if not len(plan.request_indices):
                return
            batch.prefix_hit_refund = False
            self._batch_builder.apply_plan(batch, plan, order, window)
            if not batch.prefix_hit_refund or batch.out_of_blocks or batch.token_budget <= 0:
                return

    def _draft_budget(self) -> int:
        """The budget that drafts may share with the tokens of running requests. Where a prompt must fit into a step,
        drafts stand back while one waits."""
        return self._token_budget.num_tokens if self._config.chunked_prefill or not self._waiting.num_ready else 0

    def _make_view(self, batch: ScheduledBatch, num_visible: int) -> StepView:
        running = self._running.view_columns(served=batch.scheduled_rows())
        return StepView(
            now_ns=self._clock(),
            token_budget=batch.token_budget - batch.reserved_draft_budget,
            num_free_rows=self._running.num_free_rows,
            num_free_blocks=self._allocator.num_free_blocks(),
            block_size=self._allocator.block_size,
            running=running,
            waiting=self._waiting.view_columns(num_visible),
            chunked_prefill=self._config.chunked_prefill,
        )

    def _close_batch(self, batch: ScheduledBatch) -> SchedulerOutput:
        step = self._batch_builder.make_output(batch, self._num_steps)
        self._num_steps += 1
        flight = InFlightStep.from_table(step, self._running)
        self._in_flight.append(flight)
        if self._fork_groups:
            for request in flight.requests[step.sampling_mask]:
                self._unpark_children(request)
        return step

    def _pop_oldest_step(self, step: SchedulerOutput) -> InFlightStep:
        flight = self._in_flight.popleft()
        assert flight.step is step, f"step {step.step} is not the oldest in flight, {flight.step.step} is"
        return flight

    # ---- a request's passages

    def _preempt_request(self, request: Request) -> None:
        """Back to the queue, at its old place; everything is computed again. Tokens in flight must land first."""
        self._free_row_and_blocks(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._num_preemptions += 1
        if request.num_in_flight_tokens:
            self._waiting.park_request(request)
        else:
            self._waiting.add_request(request)

    def _finish_request(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Out of the engine, from wherever it is."""
        if request.status is RequestStatus.RUNNING:
            self._free_row_and_blocks(request)
        else:
            self._waiting.remove_request(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.request_id]
        self._fork_groups.remove_child(request)
        self._unpark_children(request)
        if self._speculation is not None:
            self._speculation.request_finished(request)
        if self._policy_guard.wants_finished_requests:
            self._policy_guard.request_finished(_request_info(request), self._make_usage(request))

    def _free_row_and_blocks(self, request: Request) -> None:
        """Give up row and blocks; what has landed stays findable."""
        landed = min(int(self._running.num_committed_tokens[request.row]), request.num_tokens)
        self._allocator.cache_full_blocks(request, landed)
        self._allocator.free(request)
        self._running.free_row(request)

    def _make_usage(self, request: Request) -> Usage:
        granted = request.first_scheduled_ns
        return Usage(
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            run_ns=max(self._clock() - granted, 0) if granted else 0,
        )

    def _is_prompt_computed(self, request: Request) -> bool:
        return request.row >= 0 and bool(self._running.num_computed_tokens[request.row] >= request.prompt_len)

    def _unpark_children(self, parent: Request) -> None:
        for child in self._fork_groups.pop_children(parent):
            self._waiting.unpark_request(child)

    def _rekey_requests(self) -> None:
        """Another policy: rank everybody anew, those running too, who may come back."""
        for request in self._requests.values():
            request.queue_key = (self._policy_guard.admission_key(_request_info(request)), request.queue_key[1])
        self._waiting.reorder_requests()


def _request_info(request: Request) -> RequestInfo:
    return RequestInfo(
        request_id=request.request_id,
        arrival_ns=request.arrival_ns,
        prompt_len=request.prompt_len,
        max_tokens=request.max_total_tokens - request.prompt_len,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )
