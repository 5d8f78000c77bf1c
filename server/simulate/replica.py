"""One engine on a virtual clock: the scheduler, allocator and policy that serve, and step times from a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.errors import InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest, ModelRunnerOutput, SchedulerOutput
from quire.core.request import Request
from quire.core.sched.skipping_scheduler import SkippingScheduler
from quire.core.stats import StepStats
from quire.core.traces.recorder import TraceRecorder
from quire.server.simulate.drafts import SimulatedDrafts
from quire.server.simulate.length_worker import LengthWorker, RequestTokens
from quire.server.simulate.step_model import EngineLimits, StepHostTimes, StepShape, StepTimeModel

__all__ = ["Replica", "RequestLog", "StepObserver"]

_IDLE_NS = 1_000_000  # as the engine core: the policy scheduled nothing though requests wait

StepObserver = Callable[[int, SchedulerOutput, int], None]
"""Told of each step: when it was scheduled, the step, and its time on the device in ns."""


@dataclass(slots=True)
class RequestLog:
    """What became of one request. Times in nanoseconds of the simulation, as its client saw them; 0: never."""

    arrival_ns: int
    prompt_len: int
    first_token_ns: int = 0
    end_ns: int = 0
    output_len: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    reason: str = ""


class _InFlight(NamedTuple):
    step: SchedulerOutput
    output: ModelRunnerOutput
    end_ns: int
    num_reqs: int
    start_ns: int


class Replica:
    """Serves requests in virtual time, turn by turn as the engine core does: take what has arrived, schedule a step,
    launch it, then wait for the step before.

    With ``skip_equal_steps``, turns that would only repeat the one before are skipped where the policy promises it.
    """

    def __init__(
        self,
        model: StepTimeModel,
        limits: EngineLimits,
        allocator: KVAllocator,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        *,
        skip_equal_steps: bool = True,
        observe_step: StepObserver | None = None,
        max_queued: int | None = None,
        recorder: TraceRecorder | None = None,
        drafts: SimulatedDrafts | None = None,
    ) -> None:
        self._model = model
        self._host_times: dict[int, StepHostTimes] = {}  # of steps of so many decodes
        self._max_in_flight = limits.max_in_flight_steps
        watched = observe_step is not None or recorder is not None
        self._skip_equal_steps = skip_equal_steps and limits.max_in_flight_steps == 2 and not watched
        self._recorder = recorder
        self._observe_step = observe_step
        self.now_ns = 0
        """The virtual clock of the engine's thread."""
        self.allocator = allocator
        self.scheduler = SkippingScheduler(
            SchedulerConfig(limits.max_num_seqs, limits.max_num_batched_tokens, limits.chunked_prefill, max_queued),
            CacheConfig(limits.block_size, limits.num_blocks, watermark=limits.watermark),
            allocator,
            policy,
            fallback=fallback,
            max_model_len=limits.max_model_len,
            clock=self.read_clock if recorder is None else recorder.clock,
            timer=self.read_clock if recorder is None else recorder.clock,  # it does not see how long a policy thinks
            on_end=self._note_end,
            speculation=None if drafts is None else drafts.make_config(),
        )
        self._tokens: dict[int, RequestTokens] = {}
        self._worker = LengthWorker(limits.max_num_seqs, self._tokens, drafts)
        self._pending: deque[tuple[int, EngineCoreRequest]] = deque()  # (when it reaches the engine core, request)
        self._in_flight: deque[_InFlight] = deque()
        self._device_free_ns = 0
        self._device_ns = 1  # of the last step
        self.device_busy_ns = self.num_steps = self.num_skipped_steps = 0
        self.unknown_ns = 0
        """Of ``device_busy_ns``, of steps larger than any that the step model knows."""
        self.logs: dict[int, RequestLog] = {}
        self.first_refusal = ""
        """Why the first request that was not served was refused."""

    def read_clock(self) -> int:
        """The virtual time in nanoseconds."""
        return self.now_ns

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._pending or self._in_flight or self.scheduler.has_unfinished_requests)

    @property
    def num_requests(self) -> int:
        """Requests that arrived and have not ended."""
        return len(self._pending) + self.scheduler.num_running + self.scheduler.num_waiting

    def add_request(self, request: EngineCoreRequest, tokens: RequestTokens) -> None:
        """A request arrives at its ``arrival_ns``, none before the one before it."""
        self._tokens[request.request_id] = tokens
        self.logs[request.request_id] = RequestLog(request.arrival_ns, len(request.prompt_token_ids))
        self._pending.append((request.arrival_ns + round(self._model.host.arrival_us * 1e3), request))

    def change_policy(self, policy: BatchingPolicy, name: str) -> None:
        """Ask another policy from now on, as ``POST /admin/policy`` does."""
        self.scheduler.policy_runner.replace_policy(policy, name)

    def change_model(self, model: StepTimeModel) -> None:
        """Steps take other times from now on."""
        self._model = model
        self._host_times.clear()

    def advance(self, until_ns: int) -> None:
        """Serve up to ``until_ns``: the turn that begins before it is carried out whole."""
        while self.now_ns < until_ns:
            if not self._in_flight and not self.scheduler.has_unfinished_requests:
                if not self._pending or self._pending[0][0] >= until_ns:
                    return
                self.now_ns = max(self.now_ns, self._pending[0][0])
            self._take_arrivals()
            if self._skip_equal_steps and len(self._in_flight) == 1:
                self._skip_steps(until_ns)
                if self.now_ns >= until_ns:
                    return
                self._take_arrivals()
            self._run_turn()

    def _take_arrivals(self) -> None:
        pending = self._pending
        while pending and pending[0][0] <= self.now_ns:
            request = pending.popleft()[1]
            try:
                self.scheduler.add_request(request)
                if self._recorder is not None:
                    self._recorder.record_arrival(request)
            except (QueueFullError, InvalidRequestError) as error:
                log = self.logs[request.request_id]
                log.reason = "refused" if isinstance(error, QueueFullError) else "invalid"
                log.end_ns = self.now_ns
                self.first_refusal = self.first_refusal or str(error)

    def _run_turn(self) -> None:
        """As ``EngineCore.step``."""
        in_flight, launched = self._in_flight, False
        if len(in_flight) < self._max_in_flight:
            step = self.scheduler.schedule()
            if self.scheduler.failed_outputs:
                self._note_refusals()
            if step is not None:
                launched = True
                self._launch(step)
        if in_flight and not (launched and len(in_flight) < self._max_in_flight):
            self._finish_oldest()
        elif not in_flight and not launched:
            self.now_ns += _IDLE_NS

    def _launch(self, step: SchedulerOutput) -> None:
        num_reqs = len(step.rows)
        host = self._get_host_times(*_measure_host_work(step))
        shape = _measure_shape(step)
        device_ns = self._model.device_ns(shape)
        if self._observe_step is not None:
            self._observe_step(self.now_ns, step, device_ns)
        if self._recorder is not None:
            self._recorder.record_step(step, self.scheduler.debug_state().running.request_ids[step.rows])
        start_ns = self.now_ns
        begin_ns = max(start_ns + host.schedule_ns + host.lead_ns, self._device_free_ns)
        self.now_ns += host.schedule_ns + host.launch_ns
        end_ns = max(begin_ns + device_ns, self.now_ns)
        self._count_device_time(device_ns, shape)
        self._device_ns = max(device_ns, 1)
        self._device_free_ns = end_ns + round(self._model.host.gap_us * 1e3)
        output = self._worker.execute_step(step)
        output.device_us = device_ns / 1e3
        self._in_flight.append(_InFlight(step, output, self._device_free_ns, num_reqs, start_ns))
        self.num_steps += 1

    def _get_host_times(self, num_reqs: int, prompt_step_tokens: int = 0) -> StepHostTimes:
        if prompt_step_tokens:
            return self._model.host_ns(num_reqs, prompt_step_tokens)
        if (times := self._host_times.get(num_reqs)) is None:
            times = self._host_times[num_reqs] = self._model.host_ns(num_reqs)
        return times

    def _count_device_time(self, device_ns: int, shape: StepShape) -> None:
        self.device_busy_ns += device_ns
        if not self._model.knows_shape(shape):
            self.unknown_ns += device_ns

    def _finish_oldest(self) -> None:
        step, output, end_ns, num_reqs, start_ns = self._in_flight.popleft()
        wait_ns = max(end_ns - self.now_ns, 0)
        self.now_ns += wait_ns
        self._note_outputs(self.scheduler.update_from_output(step, output))
        if self._recorder is not None:
            schedule_ns, launch_ns, update_ns, _ = self._model.host_ns(*_measure_host_work(step))
            stats = StepStats(
                step.step,
                num_reqs,
                step.num_decodes,
                step.total_num_scheduled_tokens,
                start_us=start_ns / 1e3,
                schedule_us=schedule_ns / 1e3,
                launch_us=launch_ns / 1e3,
                device_us=output.device_us,
                wait_us=wait_ns / 1e3,
                end_us=self.now_ns / 1e3,
                update_us=update_ns / 1e3,
            )
            self._recorder.record_output(stats, output)
        self.now_ns += self._get_host_times(num_reqs).update_ns

    def _note_outputs(self, outputs: EngineCoreOutputs) -> None:
        """Requests whose first token, or last, came with a step."""
        seen_ns = self.now_ns + round(self._model.host.output_us * 1e3)
        for output in outputs.outputs:
            log = self.logs[output.request_id]
            if not log.first_token_ns:
                log.first_token_ns = seen_ns
            if output.finish_reason is not None:
                log.end_ns = seen_ns

    def _note_refusals(self) -> None:
        for output in self.scheduler.failed_outputs:
            log = self.logs[output.request_id]
            log.reason = "refused" if output.error_kind == "deadline_unmeetable" else "error"
            log.end_ns = self.now_ns
            self.first_refusal = self.first_refusal or output.error or ""
        self.scheduler.failed_outputs.clear()

    def _note_end(self, request: Request) -> None:
        log = self.logs[request.request_id]
        log.output_len = request.num_output_tokens
        log.num_cached, log.num_preemptions = request.num_cached_tokens, request.num_preemptions
        log.reason = request.finish_reason or "error"
        if self._recorder is not None:
            self._recorder.record_end(request)
        del self._tokens[request.request_id]

    def _skip_steps(self, until_ns: int) -> None:
        """Skip the turns that would only repeat the one before, up to the next arrival."""
        step, output, end_ns, num_reqs, start_ns = self._in_flight[0]
        if step.num_decodes != num_reqs:
            return
        if self._pending:
            until_ns = min(until_ns, self._pending[0][0])
        rows = self.scheduler.debug_state().running.rows
        # No step of so many requests takes less than the last one.
        limit = (until_ns - self.now_ns) // self._device_ns + 2
        num_steps = min(limit, self._worker.count_steps_before_end(rows)) if len(rows) else 0
        if num_steps < 2:
            return
        num_steps = self.scheduler.count_skippable_steps(num_steps)
        if num_steps < 2:
            return
        first_context = int(step.max_seq_lens.sum(dtype=np.int64))
        contexts = first_context + num_reqs * np.arange(1, num_steps + 1, dtype=np.int64)
        times = self._model.decode_ns(num_reqs, contexts).tolist()
        # The clock of each turn, exactly as ``_launch`` and ``_finish_oldest`` move it.
        schedule_ns, launch_ns, update_ns, lead_ns = self._model.host_ns(num_reqs)
        host_ns, gap_ns = schedule_ns + launch_ns, round(self._model.host.gap_us * 1e3)
        now, device_free, count = self.now_ns, self._device_free_ns, 0
        for device_ns in times:
            if now >= until_ns:
                break
            begin = max(now + schedule_ns + lead_ns, device_free)
            now += host_ns
            device_free = max(begin + device_ns, now) + gap_ns
            now = max(now, end_ns) + update_ns
            end_ns = device_free
            count += 1
        if not count:
            return
        self.scheduler.skip_steps(count, self._worker.skip_steps(rows, count))
        self.now_ns, self._device_free_ns = now, device_free
        self._count_device_time(sum(times[:count]), _measure_shape(step))
        if self._worker.has_sequences:
            output = self._worker.sample_tokens(step)
        self._in_flight[0] = _InFlight(step, output, end_ns, num_reqs, start_ns)
        self.num_steps += count
        self.num_skipped_steps += count


def _measure_shape(step: SchedulerOutput) -> StepShape:
    num_reqs, num_decodes = len(step.rows), step.num_decodes
    lengths = step.max_seq_lens
    if num_decodes == num_reqs:
        return StepShape(num_reqs, num_reqs, int(lengths.sum(dtype=np.int64)), 0, num_decodes)
    tokens, ends = step.num_scheduled_tokens[num_decodes:].astype(np.int64), lengths[num_decodes:].astype(np.int64)
    pairs = int((tokens * ends - tokens * (tokens - 1) // 2).sum())
    context = int(lengths[:num_decodes].sum(dtype=np.int64))
    return StepShape(num_reqs, step.total_num_scheduled_tokens, context, pairs, num_decodes)


def _measure_host_work(step: SchedulerOutput) -> tuple[int, int]:
    """Its requests, and its tokens if it has prompts."""
    num_reqs = len(step.rows)
    return num_reqs, step.total_num_scheduled_tokens if step.num_decodes < num_reqs else 0
