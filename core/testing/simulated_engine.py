"""An engine without a model: a scheduler and a ``FakeKVWorker``, with two steps in flight, checked after every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from quire.core.adapters import AdapterRef
from quire.core.config import CacheConfig, SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.spec_decode import HostProposer
from quire.core.messages import EngineCoreOutput, EngineCoreRequest, ModelRunnerOutput, SchedulerOutput
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.core.scheduling_params import SchedulingParams
from quire.core.testing.fake_kv_worker import FakeKVWorker, compute_expected_tokens

__all__ = ["SimulatedEngine", "SimulatedStep"]


class SimulatedStep(NamedTuple):
    """A step in flight: the worker has executed it, the scheduler has not seen its output."""

    step: SchedulerOutput
    output: ModelRunnerOutput | None
    """None: the worker failed on the step."""
    end_ns: int
    """When it ends, by the engine's clock."""


class SimulatedEngine:
    """Serves requests through a real scheduler, and knows what each must receive.

    ``finish_step`` raises ``AssertionError`` if a request receives a token that it would not receive alone, or one
    after its end; the worker does if a step would read what is not there.

    The clock, ``now_ns``, goes on by a millisecond at each turn. With ``step_time_ms`` it shows what a device would
    take on which steps run one after another, each for so many milliseconds; ``advance_clock`` passes idle time.

    ``max_loras`` adapters fit on the device; each takes ``staging_turns`` turns to read.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        *,
        config: SchedulerConfig | None = None,
        watermark: float = 0.01,
        max_model_len: int = 64,
        vocab_size: int = 50,
        max_in_flight: int = 2,
        speculation: SpeculationConfig | None = None,
        proposer: HostProposer | None = None,
        draft_accuracy: float = 0.5,
        step_time_ms: Callable[[SchedulerOutput], float] | None = None,
        max_loras: int = 0,
        staging_turns: int = 0,
        num_stages: int = 1,
    ) -> None:
        cache = CacheConfig(block_size=allocator.block_size, num_blocks=allocator.num_blocks, watermark=watermark)
        self.allocator = allocator
        self.scheduler = Scheduler(
            config or SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
            cache,
            allocator,
            policy,
            fallback=fallback,
            max_model_len=max_model_len,
            clock=lambda: self.now_ns,
            speculation=speculation,
            proposer=proposer,
            max_loras=max_loras,
            num_stages=num_stages,
        )
        self._staging_turns = staging_turns
        self._turns_left: dict[int, int] = {}  # by adapter, until it is in host memory
        self.worker = FakeKVWorker(
            allocator.groups, allocator.num_blocks, allocator.block_size, vocab_size, draft_accuracy
        )
        self.now_ns = 0
        """The engine's clock."""
        self.received: dict[str, list[int]] = {}
        self.token_times_ns: dict[str, list[int]] = {}
        """When each request received each token."""
        self.finished: dict[str, str] = {}
        """Finish reasons, by request id."""
        self.outputs: list[EngineCoreOutput] = []
        self.in_flight: deque[SimulatedStep] = deque()
        self._expected: dict[str, list[int]] = {}
        self.numbers: dict[str, int] = {}
        """The engine core's number of each request, in order of arrival from 0."""
        self._names: list[str] = []  # by number
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_in_flight = max_in_flight
        self._step_time_ms = step_time_ms
        self._device_free_ns = 0

    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        eos: Sequence[int] = (),
        priority: int = 0,
        salt: str | None = None,
        parent: str | None = None,
        adapter: AdapterRef | None = None,
        scheduling: SchedulingParams | None = None,
        arrival_ns: int | None = None,
        **params: object,
    ) -> None:
        """Queue a request, which came now or at ``arrival_ns``. ``params`` are those of ``SamplingParams``."""
        params.setdefault("seed", len(self._expected))
        sampling = SamplingParams(**params)  # type: ignore[arg-type]
        number = len(self._names)
        self.scheduler.add_request(
            EngineCoreRequest(
                number,
                list(prompt),
                sampling,
                self.now_ns if arrival_ns is None else arrival_ns,
                list(eos),
                priority,
                salt,
                None if parent is None else self.numbers.get(parent, -1),
                request_id,
                scheduling,
                adapter,
            )
        )
        self.numbers[request_id] = number
        self._names.append(request_id)
        self._expected[request_id] = self._expect_tokens(prompt, sampling, eos, adapter)
        self.received[request_id], self.token_times_ns[request_id] = [], []

    def abort_request(self, request_id: str) -> None:
        """End a request now."""
        assert self.scheduler.abort_request(self.numbers[request_id])
        self.finished[request_id] = "abort"

    def launch_step(self) -> SchedulerOutput | None:
        """Schedule a step and send it to the worker, unless as many as allowed are in flight. None: no step."""
        step = self._schedule_step()
        if step is not None:
            output = self.worker.execute_step(step)
            self.in_flight.append(SimulatedStep(step, output, self._find_end(step, output)))
        return step

    def launch_failing_step(self, *, read_differences: bool = True) -> SchedulerOutput | None:
        """As ``launch_step``, but the worker fails: while it computes the step, or before it has read the differences
        to the step before. The scheduler is told of it by ``finish_step``."""
        step = self._schedule_step()
        if step is not None:
            self.worker.fail_step(step, read_differences=read_differences)
            self.in_flight.append(SimulatedStep(step, None, self.now_ns))
        return step

    def launch_step_out_of_memory(self, *, read_differences: bool = True) -> bool:
        """As ``launch_failing_step``, but the scheduler is told at once that memory ran out. Whether it computes the
        step's requests again in smaller ones; if not, or if there was no step, the step has failed."""
        step = self.launch_failing_step(read_differences=read_differences)
        if step is None or not self.scheduler.retract_step(step):
            return False
        self.worker.note_reported_failure(self.in_flight.pop().step)
        return True

    def finish_step(self) -> list[EngineCoreOutput]:
        """Apply the output of the oldest step in flight, or tell the scheduler that it failed, and check what the
        requests receive."""
        step, output, end_ns = self.in_flight.popleft()
        self.now_ns = max(self.now_ns, end_ns)
        if output is None:
            self.worker.note_reported_failure(step)
            outputs = self.scheduler.fail_step(step, "the worker failed").expand_outputs()
        else:
            outputs = self.scheduler.update_from_output(step, output).expand_outputs()
        self._check_outputs(outputs)
        return outputs

    def run_step(self) -> None:
        """Do what the engine core does: launch a step, then finish the one before it."""
        launched = self.launch_step()
        if self.in_flight and (launched is None or len(self.in_flight) == self._max_in_flight):
            self.finish_step()

    def run_until_finished(self, limit: int = 20_000) -> None:
        """Serve until all requests have ended. ``AssertionError`` if that takes more than ``limit`` turns."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests and not self.in_flight:
                return
            self.run_step()
        raise AssertionError(f"requests are unfinished after {limit} turns: no progress")

    def advance_clock(self, now_ns: int) -> None:
        """Nothing happens until ``now_ns``."""
        self.now_ns = max(self.now_ns, now_ns)

    def _find_end(self, step: SchedulerOutput, output: ModelRunnerOutput) -> int:
        """When the step ends that is launched now."""
        if self._step_time_ms is None:
            return self.now_ns
        duration_ns = int(self._step_time_ms(step) * 1e6)
        output.device_us = duration_ns / 1e3
        self._device_free_ns = max(self._device_free_ns, self.now_ns) + duration_ns
        return self._device_free_ns

    def _schedule_step(self) -> SchedulerOutput | None:
        if self._step_time_ms is None:
            self.now_ns += 1_000_000
        if len(self.in_flight) >= self._max_in_flight:
            return None
        self._load_adapters()
        step = self.scheduler.schedule()
        failed, self.scheduler.failed_outputs[:] = list(self.scheduler.failed_outputs), []
        self._check_outputs(failed)
        slots = self.scheduler.adapter_slots
        if step is None and not self.in_flight and (slots is None or not slots.has_pending):
            assert not self.scheduler.has_unfinished_requests, "nothing is in flight, and nothing is scheduled"
        return step

    def _load_adapters(self) -> None:
        """Give slots to adapters that requests wait for. Each is in host memory ``staging_turns`` turns after it was
        first waited for."""
        slots = self.scheduler.adapter_slots
        if slots is None or not slots.has_pending:
            return
        for ref in slots.find_unstaged():
            turns_left = self._turns_left.setdefault(ref.adapter_id, self._staging_turns)
            self._turns_left[ref.adapter_id] = turns_left - 1
            slots.set_staged(ref.adapter_id, turns_left <= 0)
        loads = slots.assign_slots()
        for slot in slots.take_cleared_slots():
            self.worker.empty_slot(slot)
        for load in loads:
            self.worker.fill_slot(load.slot, load.adapter.content_hash)
            slots.open_adapter(load.adapter.adapter_id)

    def _check_outputs(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            request_id = self._names[output.request_id]
            assert request_id not in self.finished, f"{request_id} receives something after its end"
            received, expected = self.received[request_id], self._expected[request_id]
            received += output.new_token_ids
            self.token_times_ns[request_id] += [self.now_ns] * len(output.new_token_ids)
            assert received == expected[: len(received)], f"{request_id} received {received}, not {expected}"
            if output.finish_reason is not None:
                self.finished[request_id] = output.finish_reason
                if output.finish_reason != "error":
                    assert received == expected, f"{request_id} ended after {received}, not {expected}"
            else:
                assert received != expected, f"{request_id} has all its tokens, but did not end"
        self.outputs += outputs

    def _expect_tokens(
        self, prompt: Sequence[int], params: SamplingParams, eos: Sequence[int], adapter: AdapterRef | None
    ) -> list[int]:
        """What the request receives alone: up to its stop token or its length."""
        limit = self._max_model_len - len(prompt)
        count = limit if params.max_tokens is None else min(params.max_tokens, limit)
        seed = params.seed or 0
        content_hash = "" if adapter is None else adapter.content_hash
        tokens = compute_expected_tokens(seed, prompt, count, self._vocab_size, content_hash)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        for i, token in enumerate(tokens):
            if token in stops and i + 1 >= params.min_tokens:
                return tokens[: i + 1]
        return tokens
