"""The engine core: the step. Plan, launch, and only then read back the step before."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import NoReturn

import torch

from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor, StepFuture
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.spec_decode import HostProposer
from quire.core.errors import InvalidRequestError, QueueFullError
from quire.core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    ModelRunnerOutput,
    SchedulerOutput,
)
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import load_target
from quire.core.sched.scheduler import Scheduler
from quire.core.stats import StepStats

__all__ = ["EngineCore"]

_log = logging.getLogger("quire.engine")
_DEPTH = 2  # steps under way: one runs, the next is queued behind it
_STATS_EVERY_NS = 100_000_000


class EngineCore:
    """Owns scheduler and executor. Single-threaded: whoever calls ``step`` calls everything else too.

    Asynchronous: step N + 1 is planned and launched before the tokens of step N are read. A stop is therefore found
    one step late, and the one token drawn after it is dropped.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        choice = config.plugin("executor")
        executor_class = load_target(choice.target, "quire.core.contracts.executor:Executor")
        self._executor: Executor = executor_class(config, parse_options(executor_class, choice.options))
        self.capacity = self._executor.start()
        try:
            self.scheduler = self._make_scheduler()
        except BaseException:
            self._executor.shutdown()
            raise
        self._under_way: deque[_UnderWay] = deque()
        self._traced: list[StepStats] = []
        self._rejected: list[EngineCoreOutput] = []
        self._quarantines = self._compiled = 0
        self._stats_at = 0

    def add(self, message: EngineCoreRequest) -> None:
        """Queue a request. One that cannot be served gets an output with finish reason ``error`` and the reason."""
        try:
            self.scheduler.add_request(message)
        except InvalidRequestError as error:
            kind = "full" if isinstance(error, QueueFullError) else "invalid"
            self._rejected.append(
                EngineCoreOutput(message.request_id, [], finish_reason="error", error=f"{kind}: {error}")
            )

    def abort(self, request_ids: list[str]) -> None:
        """End requests now; their blocks are free when this returns. Unknown ids are passed over."""
        for request_id in request_ids:
            self.scheduler.abort_request(request_id)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._under_way or self._rejected or self.scheduler.has_unfinished_requests)

    def step(self) -> EngineCoreOutputs:
        """Launch what can be launched, then wait for the oldest step under way. May return no outputs."""
        launched = False
        if len(self._under_way) < _DEPTH:
            start = time.perf_counter_ns()
            step = self.scheduler.schedule()
            if step is not None:
                launched = True
                self._launch(step, start)
        outputs = EngineCoreOutputs()
        if self._under_way and not (launched and len(self._under_way) < _DEPTH):
            outputs = self._commit()
        elif not self._under_way and not self._rejected and not launched:
            time.sleep(0.001)  # a policy that holds back: do not spin
        if self._rejected:
            outputs.outputs, self._rejected = [*self._rejected, *outputs.outputs], []
        outputs.steps, self._traced = self._traced, []
        outputs.stats = self._stats_now(force=not self.has_work)
        return outputs

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        figures = self.scheduler.stats()
        figures["plugin_quarantines_total"] = figures.get("plugin_quarantines_total", 0.0) + self._quarantines
        figures["kernels_compiled_total"] = float(self._compiled)
        figures["kv_blocks"] = float(self.capacity.num_blocks)
        figures["kv_block_size"] = float(self.config.cache.block_size)
        return figures

    def shutdown(self) -> None:
        """Stop the workers. Idempotent."""
        self._executor.shutdown()

    def _launch(self, step: SchedulerOutput, start: int) -> None:
        planned = time.perf_counter_ns()
        pending: StepFuture
        try:
            pending = self._executor.execute_step(step)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and self.scheduler.retract_step(step):
                _log.warning(
                    "step %d of %d tokens did not fit: retrying in smaller ones",
                    step.step,
                    step.total_num_scheduled_tokens,
                )
                return
            pending = _Failed(error)
        self._under_way.append(_UnderWay(step, pending, start, planned, time.perf_counter_ns()))

    def _commit(self) -> EngineCoreOutputs:
        under_way = self._under_way.popleft()
        step, waited = under_way.step, time.perf_counter_ns()
        try:
            result = under_way.pending.result()
        except Exception as error:
            _log.error("step %d failed; its requests end with an error", step.step, exc_info=error)
            return self.scheduler.fail_step(step, f"{type(error).__name__}: {error}")
        self._quarantines += len(result.quarantined)
        if any(reason.startswith("spec_decode/") for reason in result.quarantined):
            self.scheduler.disable_speculation()
        self._compiled += result.num_compiled_kernels
        known = time.perf_counter_ns()
        outputs = self.scheduler.update_from_output(step, result)
        self._traced.append(under_way.stats(result, waited, known, time.perf_counter_ns()))
        return outputs

    def _stats_now(self, force: bool) -> dict[str, float] | None:
        now = time.monotonic_ns()
        if not force and now - self._stats_at < _STATS_EVERY_NS:
            return None
        self._stats_at = now
        return self.stats()

    def _make_scheduler(self) -> Scheduler:
        config = self.config
        kv = config.plugin("kv")
        allocator_class = load_target(kv.target, "quire.core.contracts.kv:KVAllocator")
        allocator: KVAllocator = allocator_class(
            self.capacity.groups,
            self.capacity.num_blocks,
            config.cache.block_size,
            prefix_caching=config.cache.prefix_caching,
            options=parse_options(allocator_class, kv.options),
        )
        return Scheduler(
            config.scheduler,
            config.cache,
            allocator,
            self._policy("policy"),
            fallback=self._policy("policy_fallback"),
            max_model_len=config.model.max_model_len,
            speculation=config.speculation,
            proposer=self._host_proposer(),
        )

    def _host_proposer(self) -> HostProposer | None:
        spec = self.config.speculation
        if spec is None:
            return None
        choice = self.config.plugin("spec_decode")
        cls = load_target(choice.target, "quire.core.contracts.spec_decode:SpeculativeProposer")
        return (
            cls(spec.num_speculative_tokens, parse_options(cls, choice.options))
            if issubclass(cls, HostProposer)
            else None
        )

    def _policy(self, kind: str) -> BatchingPolicy:
        choice = self.config.plugin(kind)
        cls = load_target(choice.target, "quire.core.contracts.policy:BatchingPolicy")
        return cls(parse_options(cls, choice.options))


@dataclass(slots=True)
class _UnderWay:
    """A launched step, and when what happened to it; nanoseconds."""

    step: SchedulerOutput
    pending: StepFuture
    start: int
    planned: int
    launched: int

    def stats(self, result: ModelRunnerOutput, waited: int, known: int, booked: int) -> StepStats:
        return StepStats(
            step=self.step.step,
            num_reqs=len(self.step.rows),
            num_decodes=self.step.num_decodes,
            num_tokens=self.step.total_num_scheduled_tokens,
            start_us=self.start / 1e3,
            schedule_us=(self.planned - self.start) / 1e3,
            launch_us=(self.launched - self.planned) / 1e3,
            device_us=result.device_us,
            wait_us=(known - waited) / 1e3,
            end_us=known / 1e3,
            update_us=(booked - known) / 1e3,
            num_drafts=0 if result.num_verified_drafts is None else int(result.num_verified_drafts.sum()),
            num_accepted=int(result.num_sampled_tokens.sum() - self.step.sampling_mask.sum()),
        )


class _Failed:
    """A step that could not even be launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> NoReturn:
        raise self._error

    def done(self) -> bool:
        return True
