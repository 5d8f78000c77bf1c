"""The scheduler: decides what each step computes, and applies what comes back.

One step, in the order and with the names of the code below::

    schedule() -> SchedulerOutput
        batch = ScheduledBatch(token_budget)                  # scheduled_batch.py: the step being built
        MicroBatches.hold_rows()                              # micro_batches.py: rows left to steps on other stages
        Speculation.plan_drafts()                             # speculation.py: budget reserved for drafts
        _fill_batch(batch), until no budget, no blocks or no requests are left:
            plan = PolicyRunner.make_plan(batch, ...)         # policy_runner.py
                view = _make_view(batch, ...)                 #   running requests, the head of the queue, as columns
                grants = BatchingPolicy.schedule(view)        #   a plugin, or default_policy_plan.py
                check_grants(grants, view) -> CheckedPlan     #   cut to what is possible; policy_guard.py replaces
            BatchBuilder.apply_plan(batch, plan, ...)         # batch_builder.py
                _schedule_running: allocate blocks; preempt when there are none, the last in rank first
                _admit_request: fork the parent or match the prefix; allocate blocks; RunningBatch.add_row
            again with what is left, if cached prefixes gave budget back
        _close_batch(batch)
            BatchBuilder.make_output(batch)                   # counts of the running batch; the message to the worker
            InFlightStep.from_running(...)                    # output_updater.py: which request has which row

    The worker runs the step. Meanwhile the next one is scheduled: sampled tokens count before they are read.

    update_from_output(step, output) -> EngineCoreOutputs     # steps come back in order
        _pop_oldest_step(step)
        OutputUpdater.update_from_output(...)                 # output_updater.py
            requests preempted meanwhile keep their tokens; for finished ones the output is dropped
            append sampled tokens, take rejected drafts back, put full blocks into the prefix cache
            stop tokens, length, log-probabilities -> EngineCoreOutput; _finish_request frees row and blocks

    or, if the worker failed:   fail_step(step)               # its requests end with an error
    or, if memory ran out:      retract_step(step)            # its requests are preempted; steps get smaller
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.spec_decode import HostProposer
from quire.core.errors import InvalidRequestError
from quire.core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    ErrorKind,
    FinishReason,
    ModelRunnerOutput,
    SchedulerOutput,
)
from quire.core.request import Request, RequestStatus
from quire.core.sched.adapter_slots import AdapterSlots
from quire.core.sched.batch_builder import BatchBuilder
from quire.core.sched.debug_state import SchedulerDebugState
from quire.core.sched.kv_guard import AllocatorError
from quire.core.sched.limits import RequestLimits, TokenBudget
from quire.core.sched.micro_batches import MicroBatches
from quire.core.sched.output_updater import InFlightStep, OutputUpdater
from quire.core.sched.policy_runner import PolicyRunner
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.scheduled_batch import ScheduledBatch
from quire.core.sched.speculation import make_speculation
from quire.core.sched.waiting_queue import ForkGroups, WaitingQueue
from quire.core.stats import QuarantinedPlugin

__all__ = ["Scheduler"]


class Scheduler:
    """Schedules steps, keeps every request from arrival to end, and applies the output of steps.

    Scheduling never waits for a sampled token: the worker feeds it back by itself, so a token that is sampled and not
    yet read back counts as known. Several steps may be in flight; their outputs are applied in order.

    A request waits (in the queue, or parked until its parent's prompt is computed or its own tokens in flight are
    read), runs (it has a row), and ends. It may leave its row at any moment: steps in flight know which generation of
    the row they are for.
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
        clock: Callable[[], int] = time.monotonic_ns,
        timer: Callable[[], int] = time.monotonic_ns,
        speculation: SpeculationConfig | None = None,
        proposer: HostProposer | None = None,
        policy_names: tuple[str | None, str | None] = (None, None),  # of the policy and the fallback
        proposer_name: str | None = None,
        max_loras: int = 0,
        num_stages: int = 1,
        on_end: Callable[[Request], None] | None = None,
    ) -> None:
        num_speculative_tokens = 0 if speculation is None else speculation.num_speculative_tokens
        self._limits = RequestLimits(config, allocator, max_model_len, num_speculative_tokens)
        self._config = config
        self._allocator = allocator
        self._clock, self._on_end = clock, on_end
        self._running = RunningBatch(
            config.max_num_seqs,
            allocator.block_size,
            has_windows=any(group.window is not None for group in allocator.groups),
            prefix_caching=allocator.prefix_caching,
        )
        self._waiting = WaitingQueue(allocator.block_size)
        self._requests: dict[int, Request] = {}
        self._fork_groups = ForkGroups(self._waiting, self._running)
        self.in_flight: deque[InFlightStep] = deque()
        """Steps that were scheduled and not applied, the oldest first. To look at."""
        self.quarantined: list[QuarantinedPlugin] = []
        """The policy and the proposer on the host, if they were quarantined."""
        self.failed_outputs: list[EngineCoreOutput] = []
        """Ends of requests between steps, to be sent."""
        self.policy_runner = PolicyRunner(
            policy,
            fallback,
            policy_names,
            config=config,
            running=self._running,
            waiting=self._waiting,
            allocator=allocator,
            requests=self._requests,
            clock=clock,
            timer=timer,
            on_quarantine=self.quarantined.append,
            refuse=lambda request, error: self.failed_outputs.append(
                self.end_with_error(request, error, "deadline_unmeetable")
            ),
        )
        self._speculation = make_speculation(
            speculation, self._running, num_stages, self.quarantined.append, proposer, proposer_name
        )
        unpark_request = self._waiting.unpark_request
        self._output_updater = OutputUpdater(
            self._running, allocator, self._finish_request, unpark_request, self._speculation, self.in_flight
        )
        self.adapter_slots: AdapterSlots | None = None
        """Where there are adapters, which of them have slots."""
        if max_loras:
            self.adapter_slots = AdapterSlots(
                max_loras, self._waiting, self.in_flight, self.policy_runner.log, clock=clock
            )
        self._micro_batches = MicroBatches(num_stages, self._running, self.in_flight)
        self._batch_builder = BatchBuilder(
            self._running,
            self._waiting,
            allocator,
            watermark=int(cache.watermark * (allocator.num_blocks - 1)),
            preempt=self._preempt_request,
            requests=self._requests,
            clock=clock,
            speculation=self._speculation,
            adapter_slots=self.adapter_slots,
        )
        self._token_budget = TokenBudget(config, max_model_len)
        self._num_steps = self._num_preemptions = 0

    # ---- Requests arrive and are aborted.

    def add_request(self, message: EngineCoreRequest) -> Request:
        """Queue a request. Raises ``InvalidRequestError`` if it can never run, ``QueueFullError`` if not now."""
        if message.request_id in self._requests:
            raise InvalidRequestError(f"request {message.request_id} is in the engine already")
        request = self._limits.validate_request(message, self.num_waiting, len(self._running))
        self.policy_runner.add_request(request)
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = []
        parent = None if request.parent_id is None else self._requests.get(request.parent_id)
        self._fork_groups.add_request(request, parent)
        self._requests[request.request_id] = request
        return request

    def abort_request(self, request_id: int, reason: FinishReason = "abort", *, evict_prefix: bool = False) -> bool:
        """End a request now: its blocks and its row are free when this returns, and its tokens in flight are dropped.
        With ``evict_prefix`` its blocks leave the prefix cache. False if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if evict_prefix:
            self._allocator.evict_prefix(request)
        self._finish_request(request, reason, None)
        return True

    # ---- Steps are scheduled, and come back.

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if nothing can run before the output of a step in flight is in (or at all)."""
        while True:
            batch = ScheduledBatch(self._token_budget.num_tokens)
            self._micro_batches.hold_rows()
            if self._speculation is not None:
                draft_budget = self._token_budget.limit_drafts(self._waiting.num_ready)
                batch.reserved_draft_budget = self._speculation.plan_drafts(draft_budget)
            try:
                self._fill_batch(batch)
            except AllocatorError as fault:
                self._recover_from(fault)
                continue
            if batch.groups:
                self.policy_runner.guard.note_progress()
                return self._close_batch(batch)
            if self.in_flight or not (len(self._running) or self._waiting.num_ready):
                return None
            # The engine is idle and has requests: the policy is asked again, and replaced if it goes on like this.
            if not self.policy_runner.guard.note_empty_plan():
                return None

    def update_from_output(self, step: SchedulerOutput, output: ModelRunnerOutput) -> EngineCoreOutputs:
        """Apply the output of ``step``, the oldest in flight."""
        self._token_budget.record_fitting_step()
        outputs = self._output_updater.update_from_output(self._pop_oldest_step(step), output)
        self.policy_runner.step_finished(step, output)
        return outputs

    def fail_step(self, step: SchedulerOutput, error: str) -> EngineCoreOutputs:
        """``step``, the oldest in flight, failed on the worker: its requests end with ``error``, the others go on. With
        its requests end those that share a prompt which it was to compute. Nothing of it enters the prefix cache."""
        failed = self._pop_oldest_step(step)
        requests = (*failed.requests, *failed.find_children(self.in_flight))
        outputs = [self.end_with_error(each, error) for each in requests if each.status is not RequestStatus.FINISHED]
        self._running.restore_freed_rows(step.freed_rows)
        return EngineCoreOutputs(outputs)

    def retract_step(self, step: SchedulerOutput) -> bool:
        """``step``, the newest in flight, did not fit into the device's memory and changed nothing there. Its requests
        go back to the queue, to be computed again in smaller steps, and keep every token. False, and nothing changes,
        if steps cannot get smaller."""
        if not self._token_budget.shrink_budget(step.total_num_scheduled_tokens):
            return False
        in_flight_step = self.in_flight.pop()
        newest = in_flight_step.step
        assert newest is step, f"step {step.step} is not the newest in flight, {newest.step} is"
        # What the step would have sampled will never come: the requests wait for other steps' tokens only.
        never_sampled = step.sampling_mask.astype(np.int64)
        if step.num_draft_tokens is not None:
            never_sampled += step.num_draft_tokens
        self._running.num_in_flight_tokens[step.rows] -= never_sampled
        entered = {new.request_id for new in step.new_requests}
        for request in in_flight_step.requests:
            if request.request_id in entered and not request.num_preemptions:
                request.first_scheduled_ns = request.num_cached_tokens = 0  # it was its first grant
            self._preempt_request(request)
        self._running.restore_freed_rows(step.freed_rows)
        return True

    def disable_speculation(self) -> None:
        """The proposer failed on the worker: nothing is drafted any more."""
        if self._speculation is not None:
            self._speculation.disable_drafting()

    # ---- What the scheduler reports.

    def debug_state(self) -> SchedulerDebugState:
        """The live parts, for tests and debugging."""
        return SchedulerDebugState(self._running, self._waiting, self._fork_groups, self._allocator, self._speculation)

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
        """Requests in the queue, parked ones included."""
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
            "plugin_quarantines_total": float(len(self.quarantined)),
            **({} if self._speculation is None else self._speculation.stats()),
            **({} if self.adapter_slots is None else self.adapter_slots.stats()),
        }

    # ---- A step is built.

    def _fill_batch(self, batch: ScheduledBatch) -> None:
        """Ask the policy and carry its plan out; again with what is left, while cached prefixes give budget back, or
        if nothing of the plan could be carried out."""
        running, waiting = self._running, self._waiting
        while True:
            batch.prefix_hit_refund = False
            num_visible = 0 if batch.out_of_blocks else waiting.count_visible(running.num_free_rows)
            # The requests that the view numbers. Plans are carried out on these, whatever changes meanwhile.
            running_rows, waiting_requests = running.rows, waiting.peek_requests(num_visible)
            if not len(running_rows) and not waiting_requests:
                return
            plan = self.policy_runner.make_plan(batch, self._num_steps, num_visible, waiting_requests)
            if plan is None:
                continue  # the policy was replaced
            if not len(plan.request_indices):
                return
            self._batch_builder.apply_plan(batch, plan, running_rows, waiting_requests)
            if batch.out_of_blocks and not batch.groups:
                continue  # all was granted to waiting requests that do not fit: those that run are asked for alone
            if not batch.prefix_hit_refund or batch.out_of_blocks or batch.token_budget <= 0:
                return

    def _close_batch(self, batch: ScheduledBatch) -> SchedulerOutput:
        step = self._batch_builder.make_output(batch, self._num_steps)
        self._num_steps += 1
        in_flight_step = InFlightStep.from_running(step, self._running, batch.forks)
        self.in_flight.append(in_flight_step)
        self.policy_runner.step_scheduled(step, batch)
        if self._fork_groups:
            # Requests that sample have their whole prompt computed, in stream order: their children may share it.
            for request in in_flight_step.requests[step.sampling_mask]:
                self._fork_groups.unpark_children(request)
        return step

    def _pop_oldest_step(self, step: SchedulerOutput) -> InFlightStep:
        in_flight_step = self.in_flight.popleft()
        oldest = in_flight_step.step
        assert oldest is step, f"step {step.step} is not the oldest in flight, {oldest.step} is"
        return in_flight_step

    def _recover_from(self, fault: AllocatorError) -> None:
        """The allocator failed: nothing of the step is kept, all requests go back to the queue and are computed again
        with another one. If that had been replaced already, its request ends, or all do where it raised for none."""
        for request in self._running.requests[self._running.rows].tolist():
            self._preempt_request(request)
        for request in list(self._requests.values()):
            request.block_hashes.clear()  # of the allocator's own kind
            if fault.guard.is_replaced and fault.guard.fault_request in (request, None):
                self.failed_outputs.append(self.end_with_error(request, str(fault)))
        fault.guard.replace_allocator()

    # ---- A request leaves its row, or the engine.

    def end_with_error(self, request: Request, error: str, kind: ErrorKind = "failed") -> EngineCoreOutput:
        """End a request for whatever reason; what its caller is to be sent."""
        self._finish_request(request, "error", None)
        return EngineCoreOutput(request.request_id, [], finish_reason="error", error=error, error_kind=kind)

    def _preempt_request(self, request: Request) -> None:
        """Back to the queue, at its old place. All of it is computed again, except what the prefix cache still has.
        Tokens in flight must be read first."""
        self._free_row_and_blocks(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._num_preemptions += 1
        self.policy_runner.request_preempted(request)
        if request.num_in_flight_tokens:
            self._waiting.park_request(request)
        else:
            self._waiting.add_request(request)

    def _finish_request(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Take a request out of the engine, wherever it is, and tell those that have to know."""
        if request.status is RequestStatus.RUNNING:
            self._free_row_and_blocks(request)
        else:
            self._waiting.remove_request(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.request_id]
        self._fork_groups.remove_child(request)
        self._fork_groups.unpark_children(request)
        if self._speculation is not None:
            self._speculation.request_finished(request)
        if self.adapter_slots is not None and request.adapter is not None:
            self.adapter_slots.request_finished(request)
        self.policy_runner.request_finished(request)
        if self._on_end is not None:
            self._on_end(request)

    def _free_row_and_blocks(self, request: Request) -> None:
        """Give up row and blocks; full blocks of committed tokens stay in the prefix cache."""
        # A stop token may have cut tokens off that were committed.
        num_committed = min(int(self._running.num_committed_tokens[request.row]), request.num_tokens)
        self._allocator.cache_full_blocks(request, num_committed)
        self._allocator.free(request)
        self._running.free_row(request)
