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
from quire.core.sched.batch_builder import Realiser
from quire.core.sched.draft_length import Pace
from quire.core.sched.fork_group import Families
from quire.core.sched.limits import RequestLimits
from quire.core.sched.output_updater import Flight, Landing
from quire.core.sched.policy_guard import PolicyGuard
from quire.core.sched.running_batch import RunningTable
from quire.core.sched.scheduled_batch import Draft
from quire.core.sched.speculation import Speculation
from quire.core.sched.token_budget import Budget
from quire.core.sched.waiting_queue import FRONT, WaitingQueue

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
        self._table = RunningTable(
            config.max_num_seqs,
            allocator.block_size,
            trims=any(group.window is not None for group in allocator.groups),
            stores=allocator.prefix_caching,
        )
        self._queue = WaitingQueue(allocator.block_size)
        self._requests: dict[str, Request] = {}
        self._families = Families()
        self._flights: deque[Flight] = deque()
        self._guard = PolicyGuard(policy, fallback, self._rekey)
        self._speculation: Speculation | None = None
        if speculation is not None:
            pace = Pace(speculation.num_speculative_tokens, config.max_num_seqs, speculation.adaptive, proposer is None)
            self._speculation = Speculation(speculation, self._table, pace, proposer)
        self._landing = Landing(self._table, allocator, self._finish, self._queue.unpark, self._speculation)
        self._realiser = Realiser(
            self._table,
            self._queue,
            allocator,
            watermark=int(cache.watermark * (allocator.num_blocks - 1)),
            preempt=self._preempt,
            requests=self._requests,
            clock=clock,
            speculation=self._speculation,
        )
        self._budget = Budget(config, max_model_len)
        self._arrivals = self._steps = self._preemptions = 0

    # ---- requests come and go

    def add(self, message: EngineCoreRequest) -> None:
        """Queue a request. Raises ``InvalidRequestError`` if it can never run, ``QueueFullError`` if not now."""
        if message.request_id in self._requests:
            raise InvalidRequestError(f"request id {message.request_id!r} is already in use; choose another")
        request = self._limits.admit(message, self.num_waiting)
        request.queue_key = (self._guard.key(_info(request)), self._arrivals)
        self._arrivals += 1
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = []
        self._requests[request.request_id] = request
        parent = self._requests.get(request.parent_id or "")
        if parent is not None and not self._prompt_done(parent):
            self._families.hold(request)
            self._queue.park(request)
        else:
            self._queue.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now: its blocks and its row are free when this returns, whatever is in flight is dropped.
        False if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, "abort", None)
        return True

    # ---- steps

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if nothing can run before a commit (or at all)."""
        while True:
            draft = Draft(budget_left=self._budget.tokens)
            if self._speculation is not None:
                draft.promised = self._speculation.begin(self._spare())
            self._fill(draft)
            if draft.rows:
                self._guard.fruitful()
                return self._launch(draft)
            if self._flights or not (len(self._table) or self._queue.num_ready) or not self._guard.barren():
                return None

    def commit(self, step: SchedulerOutput, result: ModelRunnerOutput) -> EngineCoreOutputs:
        """Book the result of the oldest step in flight."""
        self._budget.landed()
        return self._landing.land(self._take_flight(step), result)

    def drop(self, step: SchedulerOutput, error: str) -> EngineCoreOutputs:
        """The oldest step in flight failed on the worker: its requests end with ``error``; the others go on."""
        outputs = []
        for request in self._take_flight(step).requests:
            if request.status is not RequestStatus.FINISHED:
                self._finish(request, "error", None)
                outputs.append(EngineCoreOutput(request.request_id, [], finish_reason="error", error=error))
        return EngineCoreOutputs(outputs)

    def retract(self, step: SchedulerOutput) -> bool:
        """The newest step in flight did not fit into the device's memory and left no trace there. Its requests go back
        to the queue, to be computed again in smaller steps, and keep every token. False, and nothing changes, if steps
        cannot get smaller."""
        if not self._budget.shrink(step.total_num_scheduled_tokens):
            return False
        flight = self._flights.pop()
        assert flight.step is step, f"step {step.step} is not the newest in flight, {flight.step.step} is"
        drawn = step.sampling_mask.astype(np.int64) + (0 if step.num_draft_tokens is None else step.num_draft_tokens)
        self._table.in_flight[step.rows] -= drawn
        for request in flight.requests:
            self._preempt(request)
        return True

    def stop_drafting(self) -> None:
        """The proposer failed."""
        if self._speculation is not None:
            self._speculation.switch_off()

    # ---- figures

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._table)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, ready or not."""
        return len(self._queue)

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        kv = self._allocator.stats()
        return {
            "num_requests_running": float(self.num_running),
            "num_requests_waiting": float(self.num_waiting),
            "kv_cache_usage_perc": 1.0 - kv.num_free / max(kv.num_blocks, 1),
            "num_preemptions_total": float(self._preemptions),
            "prefix_cache_queries_total": float(kv.prefix_queries),
            "prefix_cache_hits_total": float(kv.prefix_hits),
            "prompt_tokens_total": float(self._landing.num_prompt_tokens),
            "generation_tokens_total": float(self._landing.num_generated),
            "steps_total": float(self._steps),
            "out_of_memory_total": float(self._budget.num_shrinks),
            "policy_quarantines_total": float(self._guard.num_quarantines),
            **({} if self._speculation is None else self._speculation.stats()),
        }

    # ---- a step in the making

    def _fill(self, draft: Draft) -> None:
        """Plan and realise; again with what is left, as long as cached prefixes give budget back."""
        table, queue = self._table, self._queue
        while True:
            draft.refunded = False
            rows_free = 0 if draft.blocked else min(table.num_free, queue.num_ready)
            shown = min(FRONT, 32 + 4 * table.num_free) if rows_free else 0
            order, window = table.order, queue.window(shown)
            if not len(order) and not window:
                return
            plan = self._guard.plan(self._view(draft, shown))
            if not len(plan.rows):
                return
            draft.refunded = False
            self._realiser.realise(draft, plan, order, window)
            if not draft.refunded or draft.blocked or draft.budget_left <= 0:
                return

    def _spare(self) -> int:
        """The budget that drafts may share with the tokens of running requests. Where a prompt must fit into a step,
        drafts stand back while one waits."""
        return self._budget.tokens if self._config.chunked_prefill or not self._queue.num_ready else 0

    def _view(self, draft: Draft, shown: int) -> StepView:
        running = self._table.view(served=draft.taken())
        return StepView(
            now_ns=self._clock(),
            token_budget=draft.budget_left - draft.promised,
            num_free_rows=self._table.num_free,
            num_free_blocks=self._allocator.num_free_blocks(),
            block_size=self._allocator.block_size,
            running=running,
            waiting=self._queue.view(shown),
            chunked_prefill=self._config.chunked_prefill,
        )

    def _launch(self, draft: Draft) -> SchedulerOutput:
        step = self._realiser.output(draft, self._steps)
        self._steps += 1
        flight = Flight.of(step, self._table)
        self._flights.append(flight)
        if self._families:
            for request in flight.requests[step.sampling_mask]:
                self._release_children(request)
        return step

    def _take_flight(self, step: SchedulerOutput) -> Flight:
        flight = self._flights.popleft()
        assert flight.step is step, f"step {step.step} is not the oldest in flight, {flight.step.step} is"
        return flight

    # ---- a request's passages

    def _preempt(self, request: Request) -> None:
        """Back to the queue, at its old place; everything is computed again. Tokens in flight must land first."""
        self._leave(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._preemptions += 1
        if request.num_in_flight_tokens:
            self._queue.park(request)
        else:
            self._queue.add(request)

    def _finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Out of the engine, from wherever it is."""
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        else:
            self._queue.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.request_id]
        self._families.leave(request)
        self._release_children(request)
        if self._speculation is not None:
            self._speculation.forget(request)
        if self._guard.listens:
            self._guard.finished(_info(request), self._usage(request))

    def _leave(self, request: Request) -> None:
        """Give up row and blocks; what has landed stays findable."""
        landed = min(int(self._table.landed[request.row]), request.num_tokens)
        self._allocator.cache_full_blocks(request, landed)
        self._allocator.free(request)
        self._table.leave(request)

    def _usage(self, request: Request) -> Usage:
        granted = request.first_scheduled_ns
        return Usage(
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            run_ns=max(self._clock() - granted, 0) if granted else 0,
        )

    def _prompt_done(self, request: Request) -> bool:
        return request.row >= 0 and bool(self._table.computed[request.row] >= request.prompt_len)

    def _release_children(self, parent: Request) -> None:
        for child in self._families.release(parent):
            self._queue.unpark(child)

    def _rekey(self) -> None:
        """Another policy: rank everybody anew, those running too, who may come back."""
        for request in self._requests.values():
            request.queue_key = (self._guard.key(_info(request)), request.queue_key[1])
        self._queue.resort()


def _info(request: Request) -> RequestInfo:
    return RequestInfo(
        request_id=request.request_id,
        arrival_ns=request.arrival_ns,
        prompt_len=request.prompt_len,
        max_tokens=request.max_total_tokens - request.prompt_len,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )
