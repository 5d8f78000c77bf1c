"""One rank in its process: follows the messages of the executor, and answers."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from quire.core.config import EngineConfig
from quire.core.engine.watchdog import PluginWatchdog
from quire.core.errors import QuireError
from quire.core.layers.parallel import CollectiveNotes, TensorParallel
from quire.core.log import setup_logging
from quire.core.messages import TokenMasks
from quire.core.ops.all_reduce import AllReduceKernels
from quire.core.plugin.frames import PluginFrames, describe_error
from quire.core.plugin.target import load_target
from quire.core.worker.multiproc.messages import (
    AllocateKVCache,
    CallMethod,
    CallReply,
    CheckMemory,
    CompareStep,
    MemoryChecked,
    MessageFromRank,
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
from quire.core.worker.multiproc.rank_channel import RankChannel
from quire.core.worker.multiproc.rank_launch import RankPlace
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.multiproc.stage_link import ProcessStageLink
from quire.core.worker.pipeline import StageLink
from quire.core.worker.readback import Readback
from quire.core.worker.startup_timer import StartupTimer
from quire.core.worker.worker import Worker

__all__ = ["RankWorker"]

_log = logging.getLogger("quire.worker")
_STATUS_INTERVAL_S = 0.25
_MAX_KEPT_OUTCOMES = 64


class RankWorker:
    """Runs until the executor closes the connection. The main thread launches steps; on a GPU another one waits for
    what they sampled, so that the next step is launched meanwhile."""

    def __init__(self, place: RankPlace, channel: RankChannel, store_fd: int, timer: StartupTimer) -> None:
        """``store_fd``: of the first rank, the socket over which it serves the store; -1 of the others. ``timer`` has
        run since the process began."""
        self._place = place
        self._rank, self._size = place.rank, place.size
        with contextlib.suppress(Exception):  # what is wrong comes again, and is reported, when the worker starts
            if place.device != "cpu" and torch.cuda.is_available():
                torch.cuda.set_device(place.host_rank)
                torch.zeros(1, device="cuda")  # creates the context
        self._channel, self._store_fd = channel, store_fd
        self._timer = timer
        timer.end_phase("imports")
        self._codec, self._send_codec, self._send_lock = RankCodec(), RankCodec(), threading.Lock()
        self._outcomes: dict[int, str] = {}
        self._launched_number = 0
        self._failed_number = -1  # the step whose model could not be launched: its second half is passed over
        self._results: queue.SimpleQueue[Callable[[], None]] | None = None
        self._step_timeout_s = math.inf
        self._layout = RankLayout(place.size)
        self._parallel = TensorParallel()
        self._worker: Worker | None = None
        self._frames: PluginFrames | None = None

    def run(self) -> int:
        """Follow messages until there are no more."""
        while (data := self._channel.receive()) is not None:
            status = self._channel.status
            status.begin_message()
            try:
                self._handle(self._codec.decode_to_rank(data))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # of a plugin, ``SystemExit`` included
                if not isinstance(error, QuireError):
                    _log.error("rank %d could not start", self._rank, exc_info=error)
                self._send(StartFailed(describe_error(error, self._frames), type(error).__name__))
            status.end_message()
        # Without the destructors of communication libraries: they may wait for a rank that has ended.
        os._exit(0)

    def _handle(self, message: MessageToRank) -> None:
        if isinstance(message, RunStep):
            self._run_step(message)
        elif isinstance(message, SampleTokens):
            self._sample_tokens(message)
        elif isinstance(message, CheckMemory):
            self._send(MemoryChecked(self.worker.has_memory_for(message.num_tokens)))
        elif isinstance(message, CompareStep):
            self._after_results(lambda: self._send_outcome(message.number))
        elif isinstance(message, CallMethod):
            self._call_method(message)
        elif isinstance(message, StartRank):
            self._load(message)
        else:
            self._end_start(message)

    @property
    def worker(self) -> Worker:
        """The worker, once it is loaded."""
        assert self._worker is not None, "StartRank comes first"
        return self._worker

    # ---- The start.

    def _load(self, message: StartRank) -> None:
        setup_logging(message.log_level, rank=self._rank)
        config = message.config
        self._layout = RankLayout.from_parallel(config.parallel)
        self._frames = PluginFrames(config)
        self._step_timeout_s = config.watchdog.step_timeout_s
        if config.model.device == "cuda":
            torch.cuda.set_device(self._place.host_rank)
        self._timer.end_phase("configuration")
        parallel, link = self._join_groups(config, message.store_host, message.store_port)
        self._parallel = parallel
        worker_class = load_target(message.worker_target, f"{Worker.__module__}:{Worker.__name__}")
        self._worker = worker = worker_class(config, parallel, link)
        self._timer.end_phase("joining")
        worker.startup_timer = self._timer
        worker.load_model()
        worker.build_model_runner()
        self._send(RankLoaded(worker.profile_memory()))

    def _join_groups(
        self, config: EngineConfig, store_host: str, store_port: int
    ) -> tuple[TensorParallel, StageLink | None]:
        """This rank's place in its stage, and what connects it with the other stages, if there are several."""
        if self._size == 1:
            return TensorParallel(), None
        # A rank that hangs is found by the executor, which knows how long a step may take.
        limit = timedelta(days=365)
        store = TCPStore(
            store_host,
            store_port,
            self._size,
            is_master=self._rank == 0,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=self._store_fd if self._rank == 0 else None,
        )
        backend = "nccl" if config.model.device == "cuda" else "gloo"
        device = torch.device("cuda", self._place.host_rank) if backend == "nccl" else None
        dist.init_process_group(
            backend, store=store, rank=self._rank, world_size=self._size, timeout=limit, device_id=device
        )
        notes = CollectiveNotes(self._channel.status.collective_counts)
        layout, kernels, link, stage_group = self._layout, None, None, None
        if layout.pipeline_parallel_size > 1:
            # Every rank makes every group, in the same order.
            for stage in range(layout.pipeline_parallel_size):
                group = dist.new_group(layout.list_stage(stage), timeout=limit)
                stage_group = group if stage == layout.get_stage(self._rank) else stage_group
            for tensor_rank in range(layout.tensor_parallel_size):
                ranks = layout.list_chain(tensor_rank)
                forward, backward = (dist.new_group(ranks, timeout=limit) for _ in range(2))
                if tensor_rank == layout.get_tensor_rank(self._rank):
                    link = ProcessStageLink(layout, self._rank, forward, backward, store, notes)
        if link is not None:
            link.connect(device)
        rank, size = layout.get_tensor_rank(self._rank), layout.tensor_parallel_size
        if device is not None and size > 1 and self._has_stage_on_host and config.parallel.all_reduce == "auto":
            kernels = AllReduceKernels.open(rank, size, stage_group, device)
        return TensorParallel(rank, size, stage_group, kernels, notes), link

    @property
    def _has_stage_on_host(self) -> bool:
        """Whether all ranks of this stage are on this host, of which ranks are neighbours."""
        first = self._rank - self._place.host_rank
        ranks = self._layout.list_stage(self._layout.get_stage(self._rank))
        return first <= ranks[0] and ranks[-1] < first + self._place.host_size

    def _end_start(self, message: AllocateKVCache) -> None:
        worker = self.worker
        self._timer.end_phase("other ranks")
        worker.allocate_kv_cache(message.num_blocks)
        worker.capture_graphs()
        worker.end_start()
        threading.Thread(target=self._report_status, name="quire-status", daemon=True).start()
        if worker.device.type == "cuda":  # on a CPU a step has ended when it is launched
            self._results = queue.SimpleQueue()
            threading.Thread(target=self._wait_for_results, args=(self._results,), daemon=True).start()
        # Half of what a step may take: then the step ends before the executor takes it for a hang.
        PluginWatchdog(self._step_timeout_s / 2)
        gc.collect()
        gc.freeze()  # a collection that scans what the worker was built from would stall a step
        self._send(RankReady(worker.capacity, worker.num_unchecked_tokens))

    # ---- Steps.

    def _run_step(self, message: RunStep) -> None:
        self._launched_number = message.number
        if (kernels := self._parallel.kernels) is not None:
            kernels.drop_unfinished()  # of a step that failed: on all ranks alike, or ``CompareStep`` ends them
        try:
            if message.stage == "model":
                self.worker.execute_model(message.step)
                return
            readback = self.worker.execute_step(message.step)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._failed_number = message.number
            self._note_failure(message.number, error, self._describe_sent())
            return
        self._after_results(lambda: self._send_result(message.number, readback))

    def _sample_tokens(self, message: SampleTokens) -> None:
        number = self._launched_number
        if number == self._failed_number:
            return
        try:
            readback = self.worker.sample_tokens(self._read_masks(message))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._note_failure(number, error, self._describe_sent())
            return
        self._after_results(lambda: self._send_result(number, readback))

    def _read_masks(self, message: SampleTokens) -> TokenMasks | None:
        if message.request_indices is None or message.draft_offsets is None:
            return None
        bits = message.bits
        if bits is None:
            end = message.offset + len(message.request_indices) * message.num_words
            bits = self._channel.mask_blocks[message.block][message.offset : end].reshape(-1, message.num_words)
        return TokenMasks(message.request_indices, message.draft_offsets, bits)

    def _send_result(self, number: int, readback: Readback) -> None:
        try:
            output = readback.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._note_failure(number, error)
            return
        if output.quarantined:
            self._keep_outcome(number, ", ".join(sorted(f"{p.kind}/{p.name} {p.reason}" for p in output.quarantined)))
        if self._rank == self._layout.output_rank or output.quarantined:
            self._send(StepDone(number, output))

    def _describe_sent(self) -> str:
        """What ranks have to have done alike before they failed."""
        kernels = self._parallel.kernels
        return "" if kernels is None else f" after it sent parts of {kernels.num_sent} sums"

    def _note_failure(self, number: int, error: BaseException, where: str = "") -> None:
        text = describe_error(error)
        self._keep_outcome(number, f"raised {type(error).__name__}{where}")
        plugin = None if self._frames is None else self._frames.find_raiser(error)
        code = getattr(error, "error_code", None)
        lines = "".join(traceback.format_exception(error))
        self._send(StepFailed(number, text, type(error).__name__, code, plugin, lines))

    def _keep_outcome(self, number: int, outcome: str) -> None:
        self._outcomes[number] = outcome
        while len(self._outcomes) > _MAX_KEPT_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]

    def _send_outcome(self, number: int) -> None:
        self._send(StepOutcome(number, self._outcomes.get(number, "")))

    # ---- Everything else.

    def _call_method(self, message: CallMethod) -> None:
        try:
            self._send(CallReply(self.worker.control.call_method(message.method, message.arguments)))
        except Exception as error:  # also a result that msgpack cannot hold
            self._send(CallReply(None, str(error), type(error).__name__))

    def _after_results(self, function: Callable[[], None]) -> None:
        """Call ``function`` once the results of the steps before have been sent; it may wait for the device."""
        if self._results is None:
            function()
        else:
            self._results.put(function)

    def _wait_for_results(self, results: queue.SimpleQueue[Callable[[], None]]) -> None:
        torch.cuda.set_device(self._place.host_rank)
        while True:
            results.get()()

    def _report_status(self) -> None:
        while True:
            self._channel.status.is_compiling = self.worker.is_compiling
            with _end_without_engine():
                self._channel.publish_status()
            time.sleep(_STATUS_INTERVAL_S)

    def _send(self, message: MessageFromRank) -> None:
        with self._send_lock, _end_without_engine():
            data = self._send_codec.encode(message)
            self._channel.send(data)


@contextlib.contextmanager
def _end_without_engine() -> Iterator[None]:
    """An engine that has closed the connection ends its ranks: what this one had to say is of no consequence."""
    try:
        yield
    except ConnectionError:
        os._exit(0)
