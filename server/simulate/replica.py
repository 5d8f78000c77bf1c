"""One engine on a virtual clock: the scheduler, allocator and policy that serve, and step times from a model."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.router import ReplicaLoad
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
_NEVER_NS = 1 << 62

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


class _EqualSteps(NamedTuple):
    """Turns that only repeat the one before: when each begins, its step's time on the device, and how the clock, the
    device's and the end of the step in flight stand after it."""

    starts: list[int]
    device_times: list[int]
    clocks: list[tuple[int, int, int]]


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
        self._equal_steps: _EqualSteps | None = None  # those that are known and not applied
        self._num_needed_blocks = [0]  # after so many of them
        self.quiet_until_ns = -1
        """``advance`` up to here changes nothing that others see."""
        self._load, self._load_until_ns = ReplicaLoad(0, 0, 0.0), -1
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

    def measure_load(self, at_ns: int) -> ReplicaLoad:
        """What a router is told at ``at_ns``, up to which the replica has advanced."""
        if at_ns > self._load_until_ns:
            num_running, allocator, known = self.scheduler.num_running, self.allocator, self._equal_steps
            num_free, self._load_until_ns = allocator.num_free_blocks(), self.quiet_until_ns
            if known is not None:
                needed = self._num_needed_blocks
                count = bisect_left(known.starts, at_ns)
                num_free -= needed[count]
                changed = bisect_left(needed, needed[count] + 1)  # after so many turns
                self._load_until_ns = known.starts[min(changed, len(known.starts)) - 1]
            usage = 1.0 - num_free / max(allocator.num_blocks - 1, 1)
            self._load = ReplicaLoad(num_running, self.num_requests - num_running, usage)
        return self._load

    def add_request(self, request: EngineCoreRequest, tokens: RequestTokens) -> None:
        """A request arrives at its ``arrival_ns``, none before the one before it."""
        if (known := self._equal_steps) is not None:
            self._apply_steps(known, bisect_left(known.starts, request.arrival_ns))
        self.quiet_until_ns = self._load_until_ns = -1
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

    def advance(self, until_ns: int, num_ahead: int = 0) -> None:
        """Serve up to ``until_ns``: the turn that begins before it is carried out whole.

        ``num_ahead``: look for turns to skip so many steps beyond, and apply none of them while none that comes later
        would end the skipping. For replicas that stand still at the arrivals of others: ``quiet_until_ns`` then tells
        until when they need not be asked again.
        """
        if until_ns <= self.quiet_until_ns:
            return
        self._load_until_ns = -1
        if self._equal_steps is not None:
            self._apply_steps(self._equal_steps, bisect_left(self._equal_steps.starts, until_ns))
        while self.now_ns < until_ns:
            if not self._in_flight and not self.scheduler.has_unfinished_requests:
                if not self._pending or self._pending[0][0] >= until_ns:
                    self.quiet_until_ns = self._pending[0][0] if self._pending else _NEVER_NS
                    return
                self.now_ns = max(self.now_ns, self._pending[0][0])
            self._take_arrivals()
            if self._skip_equal_steps and len(self._in_flight) == 1:
                known = self._find_equal_steps(until_ns + num_ahead * self._device_ns)
                if known is not None:
                    if known.starts[-1] >= until_ns:
                        self._keep_steps(known)
                        return
                    self._apply_steps(known, len(known.starts))
                if self.now_ns >= until_ns:
                    break
                self._take_arrivals()
            self._run_turn()
        self.quiet_until_ns = self.now_ns

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

    def _find_equal_steps(self, until_ns: int) -> _EqualSteps | None:
        """The turns before ``until_ns``, or before the next arrival, that would only repeat the one before."""
        step, _, end_ns, num_reqs, _ = self._in_flight[0]
        if step.num_decodes != num_reqs:
            return None
        if self._pending:
            until_ns = min(until_ns, self._pending[0][0])
        rows = self.scheduler.debug_state().running.rows
        # No step of so many requests takes less than the last one.
        limit = (until_ns - self.now_ns) // self._device_ns + 2
        num_steps = min(limit, self._worker.count_steps_before_end(rows)) if len(rows) else 0
        if num_steps < 2:
            return None
        num_steps = self.scheduler.count_skippable_steps(num_steps)
        if num_steps < 2:
            return None
        first_context = int(step.max_seq_lens.sum(dtype=np.int64))
        contexts = first_context + num_reqs * np.arange(1, num_steps + 1, dtype=np.int64)
        times = self._model.decode_ns(num_reqs, contexts).tolist()
        # The clock of each turn, exactly as ``_launch`` and ``_finish_oldest`` move it.
        schedule_ns, launch_ns, update_ns, lead_ns = self._model.host_ns(num_reqs)
        host_ns, gap_ns = schedule_ns + launch_ns, round(self._model.host.gap_us * 1e3)
        now, device_free = self.now_ns, self._device_free_ns
        starts: list[int] = []
        clocks: list[tuple[int, int, int]] = []
        for device_ns in times:
            if now >= until_ns:
                break
            starts.append(now)
            begin = max(now + schedule_ns + lead_ns, device_free)
            now += host_ns
            device_free = max(begin + device_ns, now) + gap_ns
            now = max(now, end_ns) + update_ns
            end_ns = device_free
            clocks.append((now, device_free, end_ns))
        return _EqualSteps(starts, times, clocks) if starts else None

    def _keep_steps(self, known: _EqualSteps) -> None:
        """Apply these later: others see no more of them than the blocks that they take."""
        self._equal_steps, self.quiet_until_ns = known, known.starts[-1]
        self._num_needed_blocks = self.scheduler.count_needed_blocks(len(known.starts))

    def _apply_steps(self, known: _EqualSteps, count: int) -> None:
        """Skip the first ``count`` of them."""
        self._equal_steps = None
        if not count:
            return
        step, output, _, num_reqs, start_ns = self._in_flight[0]
        rows = self.scheduler.debug_state().running.rows
        self.scheduler.skip_steps(count, self._worker.skip_steps(rows, count))
        self.now_ns, self._device_free_ns, end_ns = known.clocks[count - 1]
        self._count_device_time(sum(known.device_times[:count]), _measure_shape(step))
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
