"""One process a rank, each with a shard of the model; the scheduler stays in the engine core."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quire.core import errors
from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor, KVCapacity, StepFuture
from quire.core.errors import (
    ContextLengthError,
    ControlCallError,
    EngineDeadError,
    QuireError,
    WorkerDiedError,
    WorkerError,
)
from quire.core.messages import ModelRunnerOutput, SchedulerOutput, TokenMasks
from quire.core.worker.multiproc.broadcast_ring import SharedMemory
from quire.core.worker.multiproc.messages import (
    AllocateKVCache,
    CallMethod,
    CallReply,
    CheckMemory,
    CompareStep,
    MemoryChecked,
    MessageToRank,
    RankCodec,
    RankLoaded,
    RankReady,
    RunStep,
    SampleTokens,
    StartFailed,
    StartRank,
    StepDone,
    StepFailed,
    StepOutcome,
)
from quire.core.worker.multiproc.rank_group import RankGroup
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.multiproc.rank_processes import RankProcesses

__all__ = ["MultiprocExecutor"]

_log = logging.getLogger("quire.engine")
_T = TypeVar("_T")
_POLL_S = 0.5
_AGREE_S = 20.0
"""How long a rank may take to say how a step ended, once another has said that it failed."""
_CAUSE_S = 0.5
"""How long after a rank's error the end of another may be seen, which then was the cause."""
_EARLIER_S = 0.5
"""By how much a hang is found before the watchdog of the engine core finds it, which does not know the ranks."""


class MultiprocExecutor(Executor):
    """Ranks are told of a step once, through shared memory; the first one of the last stage answers with its tokens,
    any with a failure.

    All ranks of a stage do the same or the engine ends: they run the same steps in the same order, and sample the same
    tokens from the same logits. What may differ is agreed on: the blocks of the cache are the fewest of any rank;
    before a step with prompts every rank says whether its memory suffices, and if one says no none begins; a step that
    failed on one rank has failed on all of its stage, or the engine ends with ``WorkerDiedError``.
    """

    worker_target = "quire.core.worker.worker:Worker"
    """What each rank constructs."""

    def __init__(self, config: EngineConfig, options: Any = None) -> None:
        super().__init__(config, options)
        self._layout = RankLayout.from_parallel(config.parallel)
        self._size = self._layout.num_ranks
        self._codec = RankCodec()
        self._ranks: RankGroup | None = None
        self._early_processes: RankProcesses | None = None
        self._mask_blocks: list[tuple[NDArray[np.int32], SharedMemory]] = []
        self._num_steps = 0
        self._num_unchecked_tokens = 0
        self._done: dict[int, ModelRunnerOutput] = {}  # by number of the step
        self._failures: dict[int, StepFailed] = {}
        self._unusual: dict[int, int] = {}  # steps that failed or lost a plugin: the rank that said so first
        self._replies: list[dict[type, Any]] = []  # by rank: what it answered, by class
        self._dead: WorkerDiedError | None = None
        self._is_ending = False

    @property
    def pids(self) -> list[int]:
        """The processes, by rank: for tests and tools."""
        return [] if self._ranks is None else self._ranks.pids

    def use_processes(self, processes: RankProcesses) -> None:
        """Let the ranks be ``processes``, which were started before; otherwise ``start`` starts some."""
        self._early_processes = processes

    def start(self) -> KVCapacity:
        """Start the ranks, which load and measure at the same time, and agree on the number of blocks."""
        self._ranks = ranks = self._start_ranks()
        ranks.layout = self._layout
        self._replies = [{} for _ in range(self._size)]
        try:
            level = logging.getLevelName(_log.getEffectiveLevel())
            self._broadcast(StartRank(self.config, self.worker_target, level, *ranks.store_address))
            for _, memory in self._mask_blocks:
                ranks.send_mask_block(memory)
            profiles = [loaded.profile for loaded in self._gather(RankLoaded)]
            self._broadcast(AllocateKVCache(min(profile.num_blocks for profile in profiles)))
            ready = self._gather(RankReady)
        except BaseException:
            ranks.kill()
            raise
        weakref.finalize(self, ranks.kill)
        self._num_unchecked_tokens = min(rank.num_unchecked_tokens for rank in ready)
        capacities = [rank.capacity for rank in ready]
        return replace(
            capacities[0],
            weight_bytes=max(each.weight_bytes for each in capacities),
            activation_bytes=max(each.activation_bytes for each in capacities),
            graph_bytes=max(each.graph_bytes for each in capacities),
        )

    def _start_ranks(self) -> RankGroup:
        return self._early_processes or RankProcesses(self._size, self.config.model.device)

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        """Have every rank launch a step."""
        return self._run_step(RunStep(self._num_steps + 1, step))

    def execute_model(self, step: SchedulerOutput) -> None:
        """Have every rank launch a step's model."""
        self._run_step(RunStep(self._num_steps + 1, step, "model"))

    def sample_tokens(self, masks: TokenMasks | None = None) -> StepFuture:
        """Have every rank launch the rest of the step; masks that lie in shared memory are read from there."""
        self._broadcast(SampleTokens() if masks is None else self._locate_masks(masks))
        return _RankStep(self, self._num_steps)

    def _locate_masks(self, masks: TokenMasks) -> SampleTokens:
        num_masks, num_words = masks.bits.shape
        address = masks.bits.ctypes.data
        for number, (block, _) in enumerate(self._mask_blocks):
            offset = (address - block.ctypes.data) // 4
            if 0 <= offset <= block.size - num_masks * num_words and masks.bits.flags.c_contiguous:
                return SampleTokens(masks.request_indices, masks.draft_offsets, None, number, offset, num_words)
        return SampleTokens(masks.request_indices, masks.draft_offsets, masks.bits)

    def _run_step(self, message: RunStep) -> StepFuture:
        num_tokens = message.step.total_num_scheduled_tokens
        if num_tokens > self._num_unchecked_tokens:
            self._check_memory(num_tokens)
        self._broadcast(message)
        self._num_steps = message.number
        return _RankStep(self, message.number)

    def _check_memory(self, num_tokens: int) -> None:
        self._broadcast(CheckMemory(num_tokens))
        full = [rank for rank, checked in enumerate(self._gather(MemoryChecked)) if not checked.fits]
        if full:
            raise torch.OutOfMemoryError(f"a step of {num_tokens} tokens does not fit on {self._name(full[0])}")

    @property
    def is_compiling(self) -> bool:
        """Whether a rank compiles a kernel."""
        ranks = self._ranks
        return ranks is not None and ranks.is_compiling

    @property
    def is_ending(self) -> bool:
        """Whether ranks are asked why they hang, or are killed: memory of a GPU takes its time."""
        return self._is_ending

    def allocate_mask_block(self, num_rows: int, num_words: int) -> NDArray[np.int32]:
        """In memory that the ranks share."""
        memory = SharedMemory.allocate(num_rows * num_words * 4, "masks of tokens")
        block: NDArray[np.int32] = np.frombuffer(memory.map, np.int32).reshape(num_rows, num_words)
        self._mask_blocks.append((block, memory))
        if self._ranks is not None:
            self._ranks.send_mask_block(memory)
        return block

    def collective_rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Call a control method of the worker of every rank."""
        self._broadcast(CallMethod(method, dict(arguments)))
        replies = self._gather(CallReply, math.inf)
        for rank, reply in enumerate(replies):
            if reply.error is not None:
                known = _make_known_error(reply.error_class, reply.error)
                if known is None or isinstance(known, ControlCallError):
                    raise ControlCallError(f"{self._name(rank)}: {reply.error}")
                raise known
        return [reply.result for reply in replies]

    def shutdown(self) -> None:
        """End the ranks, which finish the step that they are in."""
        if self._ranks is not None:
            self._ranks.shutdown()
        for _, memory in self._mask_blocks:
            memory.close()
        self._dead = self._dead or WorkerDiedError("the executor was shut down")

    def wait_step(self, number: int) -> ModelRunnerOutput:
        """The output of a step; ``_RankStep`` calls it. Raises what all ranks raised, or ``WorkerDiedError``."""
        self._wait_until(lambda: self._is_known(number), self._step_limit_s, f"step {number}")
        if failure := self._failures.pop(number, None):
            _log.error("%s", failure.traceback.rstrip())
            raise _to_exception(failure)
        return self._done.pop(number)

    def is_step_done(self, number: int) -> bool:
        """Whether ``wait_step`` would return at once."""
        if not self._is_known(number) and self._dead is None:
            self._receive(0.0)
        return self._dead is not None or self._is_known(number)

    # ---- What ranks say.

    @property
    def _step_limit_s(self) -> float:
        limit = self.config.watchdog.step_timeout_s
        return limit - min(_EARLIER_S, limit / 10)

    def _broadcast(self, message: MessageToRank) -> None:
        if self._dead is not None:
            raise self._dead
        assert self._ranks is not None, "start comes first"
        try:
            self._ranks.broadcast(self._codec.encode(message))
        except WorkerDiedError as error:
            self._end(error)

    def _is_known(self, number: int) -> bool:
        return number in self._done or number in self._failures

    def _gather(self, reply_class: type[_T], limit_s: float | None = None) -> list[_T]:
        """The replies of this class, one of each rank. ``limit_s``: None is that of a step."""
        during_start = reply_class in (RankLoaded, RankReady)
        limit_s = math.inf if during_start else self._step_limit_s if limit_s is None else limit_s
        what = "a control call" if reply_class is CallReply else "a step" if not during_start else "the start"
        self._wait_until(lambda: all(reply_class in replies for replies in self._replies), limit_s, what)
        return [replies.pop(reply_class) for replies in self._replies]

    def _wait_until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Take what ranks send until ``condition``; end if that takes too long. While a rank compiles, or this whole
        process is stopped, the limit does not count."""
        if self._dead is not None:
            raise self._dead
        assert self._ranks is not None, "start comes first"
        seconds, last = 0.0, time.monotonic()
        while True:
            self._compare_unusual_steps()
            if condition():
                return
            if seconds >= limit_s:
                self._is_ending = True
                self._end(WorkerDiedError(self._ranks.describe_hang(seconds, what)))
            self._receive(min(_POLL_S, max(limit_s - seconds, 0.001)))
            now = time.monotonic()
            if not self.is_compiling:
                seconds += min(now - last, 2 * _POLL_S)
            last = now

    def _receive(self, seconds: float) -> None:
        assert self._ranks is not None, "start comes first"
        try:
            messages = self._ranks.receive(seconds)
        except WorkerDiedError as error:
            self._end(error)
        for rank, message in ((each.rank, self._codec.decode_from_rank(each.data)) for each in messages):
            if isinstance(message, StepDone):
                if rank == self._layout.output_rank:
                    self._done[message.number] = message.output
                if message.output.quarantined:
                    self._unusual.setdefault(message.number, rank)
            elif isinstance(message, StepFailed):
                self._failures.setdefault(message.number, message)
                self._unusual.setdefault(message.number, rank)
            elif isinstance(message, StartFailed):
                self._fail_start(rank, message)
            else:
                self._replies[rank][type(message)] = message

    def _compare_unusual_steps(self) -> None:
        """First of all: a rank that left the others keeps them from answering anything."""
        while self._unusual:
            self._compare_step(*self._unusual.popitem())

    def _compare_step(self, number: int, first_rank: int) -> None:
        """End unless all ranks of a stage say the same of a step, which was out of the ordinary for one."""
        if self._size == 1:
            return
        self._broadcast(CompareStep(number))
        deadline = time.monotonic() + min(_AGREE_S, self._step_limit_s)
        while (num_silent := sum(StepOutcome not in replies for replies in self._replies)) and (
            time.monotonic() < deadline
        ):
            self._receive(_POLL_S)
        outcomes = [replies.pop(StepOutcome).outcome if StepOutcome in replies else "" for replies in self._replies]
        stages = [self._layout.list_stage(stage) for stage in range(self._layout.pipeline_parallel_size)]
        if not num_silent and all(len({outcomes[rank] for rank in stage}) == 1 for stage in stages):
            return
        # The first rank that said so may not answer: with another step it waits for those that it left in this one.
        what = outcomes[first_rank] or "failed"
        if failure := self._failures.get(number):
            _log.error("%s", failure.traceback.rstrip())
            what = failure.error
        others = f"{num_silent} ranks do not answer" if num_silent else "other ranks did not"
        self._end(WorkerDiedError(f"{self._name(first_rank)} left the others in step {number}, and {others}: {what}"))

    def _name(self, rank: int, *details: str) -> str:
        return self._layout.describe_rank(rank, *details)

    # ---- The end.

    def _fail_start(self, rank: int, message: StartFailed) -> None:
        assert self._ranks is not None
        if known := _make_known_error(message.error_class, message.error):
            raise known
        time.sleep(_CAUSE_S)  # another rank may have ended, of which this is but the consequence
        if ended := self._ranks.find_ended():
            raise EngineDeadError(self._ranks.describe_end(ended))
        raise EngineDeadError(f"{self._name(rank)} could not start: {message.error}")

    def _end(self, error: WorkerDiedError) -> None:
        """Kill every rank and raise, now and whenever a step is asked for."""
        self._dead, self._is_ending = error, True
        if self._ranks is not None:
            self._ranks.kill()
        raise error


class _RankStep:
    """A step that the ranks run."""

    def __init__(self, executor: MultiprocExecutor, number: int) -> None:
        self._executor = executor
        self._number = number
        self._output: ModelRunnerOutput | None = None

    def result(self) -> ModelRunnerOutput:
        if self._output is None:
            self._output = self._executor.wait_step(self._number)
        return self._output

    def done(self) -> bool:
        return self._output is not None or self._executor.is_step_done(self._number)


def _make_known_error(class_name: str, message: str) -> QuireError | None:
    """One of the errors that a user can mend, as the rank raised it; None for others."""
    cls = getattr(errors, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, QuireError) or issubclass(cls, ContextLengthError):
        return None
    return cls(message)


def _to_exception(failure: StepFailed) -> Exception:
    if failure.error_class == torch.OutOfMemoryError.__name__:
        return torch.OutOfMemoryError(failure.error)
    return WorkerError(failure.error, failure.plugin, failure.error_code)
