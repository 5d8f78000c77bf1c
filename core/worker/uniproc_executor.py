"""One worker in the engine core's own process."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor, KVCapacity, StepFuture
from quire.core.errors import ConfigError
from quire.core.messages import ModelRunnerOutput, SchedulerOutput, TokenMasks
from quire.core.worker.worker import Worker

__all__ = ["UniprocExecutor"]


class UniprocExecutor(Executor):
    """One worker, which the engine core calls directly.

    On a GPU, launching returns as soon as the kernels are queued. On a CPU a thread runs the steps in order, so that
    the scheduler plans the next one meanwhile: torch releases the interpreter lock inside its operations.
    """

    def __init__(self, config: EngineConfig, options: object = None) -> None:
        super().__init__(config, options)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (size := getattr(config.parallel, name)) > 1:
                raise ConfigError(
                    f"the executor {config.plugin('executor').name!r} runs one worker, and {name} is {size}; "
                    "use --executor multiproc"
                )
        self._worker: Worker | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._model_future: Future[None] | None = None  # in the thread: of ``execute_model``

    @property
    def worker(self) -> Worker:
        """The worker, between ``start`` and ``shutdown``: for tests and tools that look inside."""
        assert self._worker is not None, "start comes first"
        return self._worker

    def start(self) -> KVCapacity:
        """Build the worker."""
        if self.config.model.device == "cpu":
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-worker")
            self._worker = self._thread.submit(_start_worker, self.config).result()
        else:
            self._worker = _start_worker(self.config)
        return self._worker.capacity

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        """Launch a step and return at once."""
        if self._thread is None:
            return self.worker.execute_step(step)
        return _ThreadedStep(self._thread.submit(self._execute_and_wait, step))

    def execute_model(self, step: SchedulerOutput) -> None:
        """Launch a step's model and return at once."""
        if self._thread is None:
            self.worker.execute_model(step)
        else:
            self._model_future = self._thread.submit(self.worker.execute_model, step)

    def sample_tokens(self, masks: TokenMasks | None = None) -> StepFuture:
        """Launch the rest of the step and return at once."""
        if self._thread is None:
            return self.worker.sample_tokens(masks)
        assert self._model_future is not None, "execute_model comes first"
        model_future, self._model_future = self._model_future, None
        return _ThreadedStep(self._thread.submit(self._sample_and_wait, model_future, masks))

    @property
    def is_compiling(self) -> bool:
        """Whether the worker compiles a kernel."""
        worker = self._worker
        return worker is not None and worker.is_compiling

    def collective_rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Call a control method of the worker."""
        call = self.worker.control.call_method
        if self._thread is None:
            return [call(method, arguments)]
        return [self._thread.submit(call, method, arguments).result()]

    def allocate_mask_block(self, num_rows: int, num_words: int) -> NDArray[np.int32]:
        """Pinned where there is a GPU, so that copies do not wait for it."""
        pinned = self.config.model.device == "cuda"
        block: NDArray[np.int32] = torch.empty((num_rows, num_words), dtype=torch.int32, pin_memory=pinned).numpy()
        return block

    def shutdown(self) -> None:
        """Finish the steps in flight, drop the worker and free its memory on the GPU."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
            if self.config.model.device == "cuda":
                gc.collect()  # a model is full of circles
                torch.cuda.empty_cache()

    def _execute_and_wait(self, step: SchedulerOutput) -> ModelRunnerOutput:
        return self.worker.execute_step(step).result()

    def _sample_and_wait(self, model_future: Future[None], masks: TokenMasks | None) -> ModelRunnerOutput:
        model_future.result()  # raises what the model raised
        return self.worker.sample_tokens(masks).result()


def _start_worker(config: EngineConfig) -> Worker:
    worker = Worker(config)
    worker.start()
    return worker


class _ThreadedStep:
    """A step in the worker thread."""

    def __init__(self, future: Future[ModelRunnerOutput]) -> None:
        self._future = future

    def result(self) -> ModelRunnerOutput:
        return self._future.result()

    def done(self) -> bool:
        return self._future.done()
