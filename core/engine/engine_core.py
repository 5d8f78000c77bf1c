"""The engine core: schedules a step, launches it, and only then reads back the tokens of the step before."""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from typing import Any

import torch

from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor, StepFuture
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.spec_decode import HostProposer
from quire.core.contracts.structured_output import GrammarState
from quire.core.control import ControlMethods
from quire.core.engine.adapter_loader import AdapterLoader
from quire.core.engine.executor_start import make_executor
from quire.core.engine.in_flight_step import FailedStep, InFlightStep
from quire.core.engine.policy_control import PolicyControl, make_policy
from quire.core.engine.step_failures import StepFailures
from quire.core.errors import EngineDeadError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, ErrorKind, SchedulerOutput
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import construct_chosen, construct_plugin, load_target
from quire.core.sched.kv_guard import GuardedAllocator
from quire.core.sched.kv_ownership import WatchedAllocator
from quire.core.sched.scheduler import Scheduler
from quire.core.stats import QuarantinedPlugin, StepStats
from quire.core.structured_output.manager import StructuredOutputManager
from quire.core.traces.recorder import TraceRecorder, start_recorder

__all__ = ["EngineCore"]

_log = logging.getLogger("quire.engine")
_STATS_INTERVAL_NS = 100_000_000
_FATAL_CUDA_ERRORS = frozenset((214, 220, 226, 700, 702, 710, *range(714, 721)))
"""``error_code`` of ``torch.AcceleratorError``, by ``cudaError_t``: ECC and NVLink errors, illegal accesses, assertions
and failed launches, after which a process can do nothing more with its device."""


class EngineCore:
    """Owns scheduler and executor. Single-threaded: all methods are called by the thread that calls ``step``.

    Asynchronous: step N + 1 is scheduled and launched before the tokens of step N are read. A stop is therefore found
    one step late, and the one token sampled after it is dropped. With several stages a step runs on each.
    """

    def __init__(
        self, config: EngineConfig, policy: BatchingPolicy | None = None, executor: Executor | None = None
    ) -> None:
        """``policy``, ``executor``: objects to use in place of new ones of the classes that ``config`` names."""
        self.config, self._given_policy = config, policy
        self._num_stages = config.parallel.pipeline_parallel_size
        self._max_in_flight = config.parallel.max_in_flight_steps
        self.executor = executor or make_executor(config)
        # First: its backend reads the tokenizer in a thread, while the workers load the model.
        self._structured_outputs = StructuredOutputManager(config, self.executor.allocate_mask_block)
        self.capacity = self.executor.start()
        self._quarantined: list[QuarantinedPlugin] = []  # on the workers, and the allocator
        self._recorder: TraceRecorder | None = None
        try:
            self._recorder = start_recorder(config, self.capacity, self._max_in_flight)
            self.scheduler = self._build_scheduler()
        except BaseException:
            self.executor.shutdown()
            raise
        self._in_flight: deque[InFlightStep] = deque()
        self._finished_step_stats: list[StepStats] = []
        self._rejected_outputs: list[EngineCoreOutput] = []
        self._num_compiled_kernels = 0
        self._step_failures = StepFailures(config, self._recorder)
        self.device_error: BaseException | None = None
        """The device failed, with a step whose requests have ended: no step can run in this process any more."""
        self._last_stats_ns = 0
        self.control = ControlMethods("engine core")
        """What control calls may call, between two steps."""
        self.control.add_method("get_stats", self.make_stats)
        self.control.add_method("collective_rpc", self.executor.collective_rpc)
        PolicyControl(self.scheduler.policy_runner, config.plugin("policy"), self._recorder).add_methods(self.control)
        self._adapter_loader: AdapterLoader | None = None
        if config.adapters is not None and self.scheduler.adapter_slots is not None:
            self._adapter_loader = AdapterLoader(
                config.adapters, self.scheduler.adapter_slots, self.executor, self._fail_adapter_requests
            )
            self._adapter_loader.add_methods(self.control)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request. One that cannot be served gets an output with finish reason ``error`` and the reason. One
        with a structured output is queued when that is compiled."""
        if request.params.structured_outputs is not None:
            self._structured_outputs.prepare_request(request)
        else:
            self._queue_request(request)

    def compile_structured_output(self, request: EngineCoreRequest) -> None:
        """Compile what the answer has to match before the request is added, and wait for it. Raises
        ``InvalidRequestError`` where that cannot be enforced."""
        if request.params.structured_outputs is not None:
            self._structured_outputs.compile_and_wait(request.params.structured_outputs)

    def _queue_request(self, request: EngineCoreRequest, state: GrammarState | None = None) -> None:
        try:
            queued = self.scheduler.add_request(request)
            if state is not None:
                self._structured_outputs.attach_grammar(queued, state)
            if self._recorder is not None:
                self._recorder.record_arrival(request)
        except QueueFullError as error:
            self.reject_request(request.request_id, str(error), "queue_full")
            if self._recorder is not None:
                self._recorder.record_arrival(request, "queue_full")
        except InvalidRequestError as error:
            self.reject_request(request.request_id, str(error), "invalid")
        except Exception as error:  # whatever was sent, the other requests go on
            _log.error("request %s could not be queued", request.external_request_id, exc_info=error)
            self.reject_request(request.request_id, "it could not be queued; the engine's log says why", "failed")

    def reject_request(self, request_id: int, error: str, kind: ErrorKind) -> None:
        """Answer a request that is not queued: an output with finish reason ``error`` and the reason."""
        self._rejected_outputs.append(
            EngineCoreOutput(request_id, [], finish_reason="error", error=error, error_kind=kind)
        )

    def _fail_adapter_requests(self, adapter_id: int, error: str) -> None:
        assert self.scheduler.adapter_slots is not None
        for request in self.scheduler.adapter_slots.take_requests(adapter_id):
            self.scheduler.failed_outputs.append(self.scheduler.end_with_error(request, error))

    def abort_requests(self, request_ids: list[int]) -> None:
        """End requests now; their blocks are free when this returns. Unknown ids are passed over."""
        for request_id in request_ids:
            if self.scheduler.abort_request(request_id):
                if self._recorder is not None:
                    self._recorder.record_abort(request_id)
            elif self._structured_outputs.num_waiting:
                self._structured_outputs.drop_waiting(request_id)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(
            self._in_flight
            or self._rejected_outputs
            or self.scheduler.has_unfinished_requests
            or self._structured_outputs.num_waiting
            or (self._adapter_loader is not None and self._adapter_loader.has_work)
        )

    def step(self) -> EngineCoreOutputs:
        """Schedule and launch a step if there is one, then wait for the oldest in flight. May return no outputs."""
        launched = False
        outputs = EngineCoreOutputs()
        failed_grammars: list[EngineCoreOutput] = []
        if self._structured_outputs.num_waiting:
            self._queue_prepared_requests()
        if self._adapter_loader is not None and self._adapter_loader.has_work:
            self._adapter_loader.advance()
        if self._can_launch:
            start = time.perf_counter_ns()
            step = self.scheduler.schedule()
            if self.scheduler.failed_outputs:
                self._rejected_outputs += self.scheduler.failed_outputs
                self.scheduler.failed_outputs.clear()
            if step is not None:
                launched = True
                if self._recorder is not None:
                    request_ids = self.scheduler.debug_state().running.request_ids[step.rows]
                    self._recorder.record_step(step, request_ids)
                if self._structured_outputs.num_requests and self._has_grammar(step):
                    outputs = self._launch_with_masks(step, start, failed_grammars)
                else:
                    self._launch_step(step, start)
            elif self._recorder is not None:
                self._recorder.record_no_step()
        # Another step is launched before the oldest is waited for: no device runs dry between two steps.
        if self._in_flight and not (launched and self._can_launch):
            outputs = self._finish_step()
        elif not self._in_flight and not self._rejected_outputs and not launched:
            time.sleep(0.001)  # the policy scheduled nothing though requests wait: do not spin
        if self._rejected_outputs:
            outputs.outputs, self._rejected_outputs = [*self._rejected_outputs, *outputs.outputs], []
        self._rejected_outputs += failed_grammars  # after their last tokens
        if not self._in_flight:
            self._structured_outputs.engine_wait.begin()
        outputs.steps, self._finished_step_stats = self._finished_step_stats, []
        self._add_stats(outputs, force=not self.has_work)
        return outputs

    def report_stats(self) -> EngineCoreOutputs:
        """Stats alone, for what changes them while no step does."""
        self._add_stats(outputs := EngineCoreOutputs(), force=True)
        return outputs

    def make_stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        figures = self.scheduler.stats()
        figures["plugin_quarantines_total"] += len(self._quarantined)
        figures["step_failures_total"] = float(self._step_failures.num_failures)
        figures["kernels_compiled_total"] = float(self._num_compiled_kernels)
        figures["kv_blocks"] = float(self.capacity.num_blocks)
        figures["kv_block_size"] = float(self.config.cache.block_size)
        figures.update(self._structured_outputs.stats())
        if self._adapter_loader is not None:
            figures.update(self._adapter_loader.stats())
        figures["kv_cache_size_tokens"] = figures["kv_block_size"] * (self.capacity.num_blocks - 1)
        return figures

    def shutdown(self) -> None:
        """Stop the workers. Idempotent."""
        self.executor.shutdown()
        self._structured_outputs.shutdown()
        if self._recorder is not None:
            self._recorder.close()

    def _queue_prepared_requests(self) -> None:
        for request, state, error in self._structured_outputs.take_prepared_requests():
            if error is None:
                self._queue_request(request, state)
            else:
                self.reject_request(request.request_id, error, "invalid")

    def _has_grammar(self, step: SchedulerOutput) -> bool:
        """Whether a request that samples in the step has a grammar."""
        return self._structured_outputs.has_grammar(step, self.scheduler.debug_state().running.requests[step.rows])

    @property
    def _can_launch(self) -> bool:
        """Whether another step may be launched. None is behind one that could not be: it would hold rows of which the
        workers know nothing yet, and be written where their last requests had blocks."""
        in_flight = self._in_flight
        max_in_flight = self._max_in_flight
        # A stage computes decodes about as fast as the host schedules them, so one step more waits for it than of
        # prompts, behind which others would wait. Masks are made from tokens that are known.
        if self._num_stages > 1 and (
            self._structured_outputs.num_requests or not all(each.is_of_decodes for each in in_flight)
        ):
            max_in_flight -= 1
        has_room = len(in_flight) < max_in_flight
        return has_room and not (in_flight and isinstance(in_flight[-1].future, FailedStep))

    def _launch_step(self, step: SchedulerOutput, start: int) -> None:
        scheduled = time.perf_counter_ns()
        future: StepFuture
        try:
            future = self.executor.execute_step(step)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self._retract_if_out_of_memory(step, error):
                return
            future = FailedStep(error)
        self._in_flight.append(InFlightStep(step, future, start, scheduled, time.perf_counter_ns()))

    def _launch_with_masks(
        self, step: SchedulerOutput, start: int, failed_grammars: list[EngineCoreOutput]
    ) -> EngineCoreOutputs:
        """As ``_launch_step``, for a step whose sampling needs masks. While its model runs, the step is read that
        sampled for its requests last, whose outputs are returned: grammars advance by its tokens, and the masks follow
        from them. That is the step before, or with several stages the newest that may have (``MicroBatches``), which is
        the step before where that is the only one."""
        outputs = EngineCoreOutputs()
        requests = self.scheduler.debug_state().running.requests[step.rows]
        step.return_drafts = step.num_tokens_to_propose > 0
        scheduled = time.perf_counter_ns()
        held_ns = masks_ns = 0
        future: StepFuture
        try:
            self.executor.execute_model(step)
            held = time.perf_counter_ns()
            self._structured_outputs.begin_catch_up()
            in_flight = self._in_flight
            if len(in_flight) >= self._num_stages or (len(in_flight) == 1 and in_flight[0].shares_rows(step)):
                outputs = self._finish_step()
            before_masks = time.perf_counter_ns()
            masks, failed = self._structured_outputs.make_masks(step, requests)
            masks_ns = time.perf_counter_ns() - before_masks
            for request in failed:
                assert request.grammar is not None
                _log.error("request %s ends: %s", request.external_request_id, request.grammar.error)
                self.scheduler.abort_request(request.request_id, "error")
                failed_grammars.append(
                    EngineCoreOutput(request.request_id, [], finish_reason="error", error=request.grammar.error)
                )
            held_ns = time.perf_counter_ns() - held
            future = self.executor.sample_tokens(masks)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self._retract_if_out_of_memory(step, error):
                return outputs
            future = FailedStep(error)
        launched = time.perf_counter_ns()
        self._in_flight.append(InFlightStep(step, future, start, scheduled, launched, requests, held_ns, masks_ns))
        return outputs

    def _retract_if_out_of_memory(self, step: SchedulerOutput, error: BaseException) -> bool:
        if isinstance(error, EngineDeadError):
            raise error  # the executor can run no other step either
        if not isinstance(error, torch.OutOfMemoryError) or not self.scheduler.retract_step(step):
            return False
        _log.warning(
            "step %d of %d tokens did not fit: retrying in smaller ones", step.step, step.total_num_scheduled_tokens
        )
        if self._recorder is not None:
            self._recorder.record_failure(step.step, retracted=True)
        return True

    def _finish_step(self) -> EngineCoreOutputs:
        in_flight = self._in_flight.popleft()
        step, wait_start = in_flight.step, time.perf_counter_ns()
        try:
            with self._structured_outputs.engine_wait:
                result = in_flight.future.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outputs = self._step_failures.fail_step(self.scheduler, step, error)
            if self._recorder is not None:
                self._recorder.record_failure(step.step)
            if getattr(error, "error_code", None) in _FATAL_CUDA_ERRORS:
                self.device_error = error
            return outputs
        if result.quarantined:
            self._quarantined += result.quarantined
            if any(plugin.kind == "spec_decode" for plugin in result.quarantined):
                self.scheduler.disable_speculation()
        if in_flight.requests is not None:
            self._structured_outputs.record_output(step, in_flight.requests, result)
        self._num_compiled_kernels += result.num_compiled_kernels
        tokens_known = time.perf_counter_ns()
        outputs = self._step_failures.update_from_output(self.scheduler, step, result)
        step_stats = in_flight.make_step_stats(result, wait_start, tokens_known, time.perf_counter_ns())
        self._finished_step_stats.append(step_stats)
        if self._recorder is not None:
            self._recorder.record_output(step_stats, result)
        return outputs

    def _add_stats(self, outputs: EngineCoreOutputs, *, force: bool) -> None:
        if force or time.monotonic_ns() - self._last_stats_ns >= _STATS_INTERVAL_NS:
            self._last_stats_ns = time.monotonic_ns()
            outputs.stats = self.make_stats()
            if self.scheduler.adapter_slots is not None:
                outputs.adapters = self.scheduler.adapter_slots.list_activity()
            outputs.quarantined = [*self.scheduler.quarantined, *self._quarantined]

    def _build_scheduler(self) -> Scheduler:
        config = self.config
        make_replacement = partial(self._build_allocator, "kv_fallback")
        allocator = GuardedAllocator(
            self._build_allocator("kv"), config.plugin("kv").name, make_replacement, self._quarantined.append
        )
        return Scheduler(
            config.scheduler,
            config.cache,
            allocator,
            self._given_policy or self._build_policy("policy"),
            fallback=self._build_policy("policy_fallback"),
            max_model_len=config.model.max_model_len,
            speculation=config.speculation,
            proposer=self._build_host_proposer(),
            policy_names=(config.plugin("policy").name, config.plugin("policy_fallback").name),
            proposer_name=None if config.speculation is None else config.plugin("spec_decode").name,
            max_loras=0 if config.adapters is None else config.adapters.max_loras,
            num_stages=self._num_stages,
            **self._clocks(),
        )

    def _clocks(self) -> dict[str, Any]:
        """A recorder keeps what the scheduler, and the guard that times the policy, read of the clock."""
        recorder = self._recorder
        if recorder is None:
            return {}
        return {"clock": recorder.clock, "timer": recorder.clock, "on_end": recorder.record_end}

    def _build_host_proposer(self) -> HostProposer | None:
        spec = self.config.speculation
        if spec is None:
            return None
        choice = self.config.plugin("spec_decode")
        cls = load_target(choice.target, "quire.core.contracts.spec_decode:SpeculativeProposer")
        if not issubclass(cls, HostProposer):
            return None  # it drafts on the device: the worker builds it
        return construct_chosen(choice, cls, spec.num_speculative_tokens)

    def _build_allocator(self, key: str) -> KVAllocator:
        config, choice = self.config, self.config.plugin(key)
        cls = load_target(choice.target, "quire.core.contracts.kv:KVAllocator")
        sizes = (self.capacity.groups, self.capacity.num_blocks, config.cache.block_size)
        options = {"prefix_caching": config.cache.prefix_caching, "options": parse_options(cls, choice.options)}
        allocator: KVAllocator = construct_plugin(f"kv/{choice.name}", cls, *sizes, **options)
        return allocator if choice.is_bundled else WatchedAllocator(allocator)

    def _build_policy(self, kind: str) -> BatchingPolicy:
        return make_policy(self.config.plugin(kind))
