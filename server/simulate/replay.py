"""Replays a recording: the same events, clock and step times through a scheduler of one's own, plan by plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.core.config import CacheConfig, SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.contracts.policy import BatchingPolicy
from quire.core.errors import ConfigError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreRequest, ModelRunnerOutput, SchedulerOutput
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import load_target
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.core.scheduling_params import SchedulingParams
from quire.core.traces.records import (
    AbortRecord,
    ArrivalRecord,
    DoneRecord,
    EndRecord,
    FailRecord,
    PolicyRecord,
    StepRecord,
)
from quire.server.simulate.sequences import FILLER, STOP, make_sequence
from quire.server.traces.recording import Recording
from quire.server.traces.trace import TraceRequest

__all__ = ["PlanDifference", "ReplayedClock", "replay_recording"]


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """Where a replay first planned something else than the recording."""

    step: int
    recorded: dict[int, int]
    """Tokens by request."""
    replayed: dict[int, int]

    def __str__(self) -> str:
        only = {i: n for i, n in self.recorded.items() if self.replayed.get(i) != n}
        instead = {i: n for i, n in self.replayed.items() if self.recorded.get(i) != n}
        return f"step {self.step}: recorded {_shorten(only)}, replayed {_shorten(instead)} (tokens by request)"


class ReplayedClock:
    """Gives the scheduler and the guard what they read when the recording was made. Should a replay read more, the last
    time is repeated."""

    def __init__(self, start_ns: int) -> None:
        self._reads: deque[int] = deque()
        self._last_ns = start_ns

    def set_reads(self, reads: list[int]) -> None:
        """The times for what comes next."""
        self._reads = deque(reads)

    def read(self) -> int:
        """Nanoseconds."""
        if self._reads:
            self._last_ns = self._reads.popleft()
        return self._last_ns


def replay_recording(
    recording: Recording,
    policy: BatchingPolicy,
    fallback: BatchingPolicy,
    allocator_class: type[KVAllocator],
    *,
    follow_switches: bool = True,
) -> Iterator[PlanDifference | int]:
    """The number of each step that was planned as recorded; or, last, where a plan differs. Raises ``ConfigError`` for
    a recording that cannot be replayed. ``follow_switches``: switch to other policies where the server was told to;
    else ``policy`` plans to the end."""
    adapters = {each.adapter for each in recording.records if isinstance(each, ArrivalRecord) and each.adapter}
    if adapters:
        raise ConfigError(
            f"{recording.name}: requests have adapters ({', '.join(sorted(adapters)[:3])}), and when those were loaded "
            f"is not recorded, so plans cannot be replayed; quire simulate takes the recording as requests of the base"
        )
    return _Replay(recording, policy, fallback, allocator_class, follow_switches).run()


class _Replay:
    def __init__(
        self,
        recording: Recording,
        policy: BatchingPolicy,
        fallback: BatchingPolicy,
        allocator_class: type[KVAllocator],
        follow_switches: bool,
    ) -> None:
        self._recording, self._follow_switches = recording, follow_switches
        engine = recording.header.engine
        self._block_size = int(engine["block_size"])
        self._clock = ReplayedClock(recording.header.origin_ns)
        self._prefix_caching = bool(engine["prefix_caching"])
        groups = [KVGroup(window) for window in engine["windows"]]
        allocator = allocator_class(groups, engine["num_blocks"], self._block_size, prefix_caching=self._prefix_caching)
        self._scheduler = Scheduler(
            SchedulerConfig(
                engine["max_num_seqs"],
                engine["max_num_batched_tokens"],
                engine["chunked_prefill"],
                engine["max_queued"],
            ),
            CacheConfig(self._block_size, engine["num_blocks"], watermark=engine["watermark"]),
            allocator,
            policy,
            fallback=fallback,
            max_model_len=engine["max_model_len"],
            clock=self._clock.read,
            timer=self._clock.read,
            speculation=_make_speculation(recording),
        )
        self._ends = {record.id: record for record in recording.records if isinstance(record, EndRecord)}
        self._sequences: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}  # by request: its tokens, those in flight included
        self._steps: deque[tuple[SchedulerOutput, list[int]]] = deque()
        self._last_ids: list[int] = []

    def run(self) -> Iterator[PlanDifference | int]:
        for record in self._recording.records:
            if isinstance(record, EndRecord):
                continue
            self._clock.set_reads(getattr(record, "clock", []))
            if isinstance(record, ArrivalRecord):
                self._add_request(record)
            elif isinstance(record, AbortRecord):
                self._scheduler.abort_request(record.id)
            elif isinstance(record, StepRecord):
                difference = self._schedule(record)
                if difference is not None:
                    yield difference
                    return
                if record.step >= 0:
                    yield record.step
            elif isinstance(record, DoneRecord):
                self._finish_step(record)
            elif isinstance(record, PolicyRecord):
                if self._follow_switches:
                    self._replace_policy(record)
            elif isinstance(record, FailRecord):
                step = self._steps.pop()[0] if record.retracted else self._steps.popleft()[0]
                if record.retracted:
                    self._scheduler.retract_step(step)
                else:
                    self._scheduler.fail_step(step, "as recorded")

    def _replace_policy(self, record: PolicyRecord) -> None:
        cls = load_target(record.target, "quire.core.contracts.policy:BatchingPolicy")
        self._scheduler.policy_runner.replace_policy(cls(parse_options(cls, record.options)), record.name)

    def _add_request(self, record: ArrivalRecord) -> None:
        end = self._ends.get(record.id)
        output_len = end.output_len if end is not None else 1 << 20
        hashes = (*record.hashes, *(end.hashes if end is not None else ()))
        length = min(output_len, self._recording.header.engine["max_model_len"])
        request = TraceRequest(0.0, record.prompt_len, length, block_hashes=hashes)
        sequence = make_sequence(request, record.id, self._block_size)
        if end is not None and end.reason == "stop":
            sequence[record.prompt_len + output_len - 1] = STOP
        parent = self._sequences.get(record.parent, []) if record.parent is not None else []
        if len(parent) >= record.prompt_len:  # n > 1: one prompt for all
            sequence[: record.prompt_len] = parent[: record.prompt_len]
        self._sequences[record.id] = sequence
        self._lengths[record.id] = record.prompt_len
        message = EngineCoreRequest(
            record.id,
            sequence[: record.prompt_len],
            SamplingParams(max_tokens=record.max_tokens, min_tokens=record.min_tokens, seed=0, stop_token_ids=[STOP]),
            record.arrival_ns,
            priority=record.priority,
            parent_id=record.parent,
            external_request_id=str(record.id),
            scheduling=SchedulingParams(**record.scheduling) if record.scheduling else None,
        )
        try:
            self._scheduler.add_request(message)
        except (QueueFullError, InvalidRequestError):
            if not record.refused:
                raise ConfigError(f"request {record.id} was accepted and is now refused: another policy?") from None

    def _schedule(self, record: StepRecord) -> PlanDifference | None:
        step = self._scheduler.schedule()
        self._scheduler.failed_outputs.clear()
        if record.step < 0 and step is None:
            return None
        self._last_ids = self._last_ids if record.ids is None else record.ids
        ids = [] if record.step < 0 else self._last_ids
        recorded = dict(zip(ids, record.tokens or [1] * len(ids), strict=True))
        planned_ids: list[int] = []
        if step is not None:
            planned_ids = self._scheduler.debug_state().running.request_ids[step.rows].tolist()
        tokens = [] if step is None else step.num_scheduled_tokens.tolist()
        replayed = dict(zip(planned_ids, tokens, strict=True))
        if replayed != recorded or step is None:
            return PlanDifference(record.step, recorded, replayed)
        self._steps.append((step, planned_ids))
        return None

    def _finish_step(self, record: DoneRecord) -> None:
        step, ids = self._steps.popleft()
        mask = step.sampling_mask
        counts = mask.astype(np.int32) if record.sampled is None else np.array(record.sampled, np.int32)
        tokens = np.full((len(ids), max(int(counts.max(initial=1)), 1)), FILLER, np.int32)
        for i, count in enumerate(counts.tolist()):
            if count:
                start = self._lengths[ids[i]]
                known = self._sequences[ids[i]][start : start + count]
                tokens[i, : len(known)] = known
                self._lengths[ids[i]] = start + count
        output = ModelRunnerOutput(
            record.step,
            tokens,
            counts,
            None if record.verified is None else np.array(record.verified, np.int32),
            device_us=record.device_us,
            ran_draft_backfill=record.ran_draft_backfill,
        )
        self._scheduler.update_from_output(step, output)


def _make_speculation(recording: Recording) -> SpeculationConfig | None:
    described: dict[str, Any] | None = recording.header.engine.get("speculation")
    if described is None:
        return None
    if described.get("on_host"):
        raise ConfigError(
            f"{recording.name}: its drafts were made on the host of tokens that the recording does not hold; record "
            "without drafts, or with a proposer on the device"
        )
    return SpeculationConfig(described["num_speculative_tokens"], adaptive=described["adaptive"])


def _shorten(tokens: dict[int, int]) -> str:
    shown = ", ".join(f"{request}: {count}" for request, count in list(tokens.items())[:6])
    return f"{{{shown}{', ...' if len(tokens) > 6 else ''}}}"
