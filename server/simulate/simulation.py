"""Runs a trace through one or several replicas, in virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.contracts.policy import BatchingPolicy
from quire.core.errors import ConfigError
from quire.core.messages import EngineCoreRequest
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams
from quire.core.traces.recorder import TraceRecorder
from quire.core.traces.records import SCHEMA_VERSION, HeaderRecord
from quire.core.version import __version__
from quire.server.simulate.drafts import SimulatedDrafts
from quire.server.simulate.length_worker import RequestTokens
from quire.server.simulate.replica import Replica, RequestLog, StepObserver
from quire.server.simulate.results import RequestTimes, SimulationResult
from quire.server.simulate.sequences import FILLER, STOP, make_sequence
from quire.server.simulate.step_model import EngineLimits, StepTimeModel
from quire.server.traces.trace import Trace, TraceRequest

__all__ = ["Assignment", "EngineSetup", "SimulatedServer", "run_simulation"]

_STEPS_AHEAD = 64
"""How far replicas look ahead for equal steps while requests arrive at others."""

_SCHEDULING_FIELDS = SchedulingParams.__struct_fields__

Assignment = Callable[[int, EngineCoreRequest, TraceRequest, Sequence[Replica]], int]
"""Which replica serves the n-th request: called at its arrival, when every replica has come as far."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What each replica is built from."""

    model: StepTimeModel
    limits: EngineLimits
    make_policy: Callable[[], BatchingPolicy]
    make_fallback: Callable[[], BatchingPolicy]
    allocator_class: Callable[..., KVAllocator]
    policy_name: str = ""
    policy_target: str = ""
    policy_options: Mapping[str, str] = field(default_factory=dict)
    prefix_caching: bool = True
    skip_equal_steps: bool = True
    drafts: SimulatedDrafts | None = None

    def build_replica(
        self, observe_step: StepObserver | None, *, prefix_caching: bool, recorder: TraceRecorder | None = None
    ) -> Replica:
        """An engine that has served nothing yet."""
        limits = self.limits
        allocator = self.allocator_class(
            (KVGroup(),), limits.num_blocks, limits.block_size, prefix_caching=prefix_caching
        )
        return Replica(
            self.model,
            limits,
            allocator,
            self.make_policy(),
            self.make_fallback(),
            skip_equal_steps=self.skip_equal_steps,
            observe_step=observe_step,
            recorder=recorder,
            drafts=self.drafts,
        )


def run_simulation(
    trace: Trace,
    setup: EngineSetup,
    *,
    num_replicas: int = 1,
    assign: Assignment | None = None,
    observe_step: StepObserver | None = None,
    record_to: Path | None = None,
) -> SimulationResult:
    """Serve the trace. Nothing in it depends on the machine or on chance: the same arguments give the same result.

    The prefix cache is left out where the trace knows of no shared prefixes: it could find nothing. ``record_to``: a
    file in which the (one) replica is recorded as ``quire serve --record`` records a server.
    """
    start = time.perf_counter()
    server = SimulatedServer(
        trace, setup, num_replicas=num_replicas, assign=assign, observe_step=observe_step, record_to=record_to
    )
    server.serve_arrivals(float("inf"))
    times = server.finish()
    return server.make_result(times, time.perf_counter() - start)


class SimulatedServer:
    """Replicas that serve a trace, for those who do something meanwhile; ``run_simulation`` is for all others."""

    def __init__(
        self,
        trace: Trace,
        setup: EngineSetup,
        *,
        num_replicas: int = 1,
        assign: Assignment | None = None,
        observe_step: StepObserver | None = None,
        record_to: Path | None = None,
    ) -> None:
        self._trace, self._setup, self._assign = trace, setup, assign
        self._prefix_caching = setup.prefix_caching and trace.hash_block_size > 0
        self._replicas: list[Replica] = []
        self._recorder: TraceRecorder | None = None
        if record_to is not None:
            self._recorder = _start_recorder(
                record_to, setup, self._prefix_caching, lambda: self._replicas[0].read_clock()
            )
        for _ in range(num_replicas):
            self._replicas.append(
                setup.build_replica(observe_step, prefix_caching=self._prefix_caching, recorder=self._recorder)
            )
        self._chosen: list[Replica] = []  # by request
        self._first_of_prompt: dict[int, int] = {}  # by ``TraceRequest.prompt_id``: the request that computes it
        self._num_waiting = self._num_running = 0  # of all replicas, at the last arrival
        self._queue_depth: list[tuple[float, int, int]] = []
        self._make_params = lru_cache(maxsize=4096)(_make_params)

    def serve_arrivals(self, until_s: float) -> None:
        """Let the requests arrive that come before ``until_s``."""
        trace, replicas = self._trace, self._replicas
        num_ahead = _STEPS_AHEAD if len(replicas) > 1 else 0
        for number in range(len(self._chosen), len(trace)):
            request = trace.requests[number]
            if request.arrival_s >= until_s:
                return
            arrival_ns = round(request.arrival_s * 1e9)
            for replica in replicas:
                if replica.quiet_until_ns < arrival_ns:
                    waiting, running = replica.scheduler.num_waiting, replica.scheduler.num_running
                    replica.advance(arrival_ns, num_ahead)
                    self._num_waiting += replica.scheduler.num_waiting - waiting
                    self._num_running += replica.scheduler.num_running - running
            parent = None
            if request.prompt_id is not None:
                first = self._first_of_prompt.setdefault(request.prompt_id, number)
                parent = None if first == number else first
            message, tokens = _make_message(
                number, request, arrival_ns, trace, self._prefix_caching, self._make_params,
                self._setup.limits.max_model_len, parent,
            )  # fmt: skip
            if parent is not None:  # one HTTP request, which goes to one replica
                replica = self._chosen[parent]
            else:
                replica = replicas[0 if self._assign is None else self._assign(number, message, request, replicas)]
            replica.add_request(message, tokens)
            self._chosen.append(replica)
            self._queue_depth.append((request.arrival_s, self._num_waiting, self._num_running))

    def switch(self, at_s: float, policy: BatchingPolicy, name: str, model: StepTimeModel) -> None:
        """From ``at_s`` on, the (one) replica has another policy, and steps take what ``model`` says."""
        (replica,) = self._replicas
        replica.advance(round(at_s * 1e9))
        replica.change_policy(policy, name)
        replica.change_model(model)

    def finish(self) -> RequestTimes:
        """Serve what has arrived to its end."""
        for replica in self._replicas:
            replica.advance(1 << 62)
        if self._recorder is not None:
            self._recorder.close()
        return _make_times([replica.logs[number] for number, replica in enumerate(self._chosen)], self._trace)

    def make_result(self, times: RequestTimes, wall_s: float) -> SimulationResult:
        """The result, after ``finish``."""
        replicas = self._replicas
        logs = [replica.logs[number] for number, replica in enumerate(self._chosen)]
        first_ns = min((log.arrival_ns for log in logs), default=0)
        busy_ns = sum(replica.device_busy_ns for replica in replicas)
        return SimulationResult(
            policy=self._setup.policy_name,
            times=times,
            duration_s=(max((log.end_ns for log in logs), default=0) - first_ns) / 1e9,
            num_steps=sum(replica.num_steps for replica in replicas),
            num_skipped_steps=sum(replica.num_skipped_steps for replica in replicas),
            device_busy_s=busy_ns / 1e9,
            unknown_share=sum(replica.unknown_ns for replica in replicas) / max(busy_ns, 1),
            known_steps=self._setup.model.describe_range(),
            num_replicas=len(replicas),
            queue_depth=self._queue_depth,
            wall_s=wall_s,
            first_refusal=next((replica.first_refusal for replica in replicas if replica.first_refusal), ""),
            quarantined=[
                f"{plugin.name}: {plugin.reason}" for replica in replicas for plugin in replica.scheduler.quarantined
            ],
        )


def _start_recorder(path: Path, setup: EngineSetup, prefix_caching: bool, clock: Callable[[], int]) -> TraceRecorder:
    limits = setup.limits
    engine = {
        **msgspec.structs.asdict(limits),
        "max_queued": None,
        "prefix_caching": prefix_caching,
        "windows": [None],
        "enforce_eager": not setup.model.pads_decodes,
        "kv": "paged",
        "speculation": setup.drafts
        and {"num_speculative_tokens": setup.drafts.num_speculative_tokens, "adaptive": True, "on_host": False},
    }
    header = HeaderRecord(
        SCHEMA_VERSION,
        __version__,
        "",
        0,
        f"simulated {setup.model.name}",
        setup.model.device,
        "",
        engine,
        {"name": setup.policy_name, "target": setup.policy_target, "options": dict(setup.policy_options)},
        "simulator",
    )
    return TraceRecorder(path, header, block_size=limits.block_size, prefix_caching=prefix_caching, clock=clock)


def _make_message(
    number: int,
    request: TraceRequest,
    arrival_ns: int,
    trace: Trace,
    prefix_caching: bool,
    make_params: Callable[[int | None], SamplingParams],
    max_model_len: int,
    parent: int | None,
) -> tuple[EngineCoreRequest, RequestTokens]:
    sequence: np.ndarray[Any, np.dtype[np.int32]] | None = None
    if prefix_caching:
        tokens = make_sequence(request, number, trace.hash_block_size)
        if parent is not None:
            first = make_sequence(trace.requests[parent], parent, trace.hash_block_size)
            tokens[: request.prompt_len] = first[: request.prompt_len]
        prompt, sequence = tokens[: request.prompt_len], np.array(tokens, np.int32)
    else:
        prompt = [FILLER] * request.prompt_len
    limit = max_model_len if request.max_tokens is None else request.prompt_len + request.max_tokens
    end_len = request.prompt_len + request.output_len
    message = EngineCoreRequest(
        number,
        prompt,
        make_params(request.max_tokens),
        arrival_ns,
        priority=request.priority,
        external_request_id=str(number),
        scheduling=_make_scheduling_params(request),
        parent_id=parent,
    )
    return message, RequestTokens(min(end_len, limit), end_len < limit, sequence)


def _make_scheduling_params(request: TraceRequest) -> SchedulingParams | None:
    """Of ``TraceRequest.scheduling`` what this version of the engine knows."""
    known = {name: request.scheduling[name] for name in _SCHEDULING_FIELDS if name in request.scheduling}
    try:
        return msgspec.convert(known, SchedulingParams) if known else None
    except msgspec.ValidationError as error:
        raise ConfigError(f"the trace's scheduling of a request cannot be read ({error}); record it again") from None


def _make_params(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, stop_token_ids=[STOP])


def _make_times(logs: Sequence[RequestLog], trace: Trace) -> RequestTimes:
    arrival, first, end = (
        np.array([getattr(log, name) for log in logs], np.float64)
        for name in ("arrival_ns", "first_token_ns", "end_ns")
    )
    output_len = np.array([log.output_len for log in logs], np.int64)
    is_served = (first > 0) & np.array([log.reason in ("stop", "length") for log in logs], bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(is_served & (output_len > 1), (end - first) / 1e9 / (output_len - 1), np.nan)
    groups = [str(request.scheduling.get("group", "")) for request in trace.requests[: len(logs)]]
    return RequestTimes(
        arrival_s=arrival / 1e9,
        ttft_s=np.where(first > 0, (first - arrival) / 1e9, np.nan),
        tpot_s=tpot,
        e2e_s=np.where(is_served, (end - arrival) / 1e9, np.nan),
        prompt_len=np.array([log.prompt_len for log in logs], np.int64),
        output_len=output_len,
        num_cached=np.array([log.num_cached for log in logs], np.int64),
        num_preemptions=np.array([log.num_preemptions for log in logs], np.int64),
        is_served=is_served,
        groups=groups if any(groups) else (),
    )
