"""An executor of several ranks without processes: each rank's worker runs in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor, KVCapacity, StepFuture
from quire.core.messages import ModelRunnerOutput, SchedulerOutput, TokenMasks
from quire.core.testing.thread_ranks import RankGroup, StageChain, ThreadRank, ThreadStageLink
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.worker import Worker

__all__ = ["ThreadRanksExecutor"]

_T = TypeVar("_T")


class ThreadRanksExecutor(Executor):
    """Runs every step on ``tensor_parallel_size`` ranks for each of ``pipeline_parallel_size`` stages, on the CPU, and
    fails a step of which those of the last stage do not give the same tokens."""

    def __init__(self, config: EngineConfig, options: Any = None) -> None:
        super().__init__(config, options)
        self._layout = layout = RankLayout.from_parallel(config.parallel)
        names = [f"quire-rank-{rank}" for rank in range(layout.num_ranks)]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in names]
        size, num_stages = layout.tensor_parallel_size, layout.pipeline_parallel_size
        self._groups = [RankGroup(threading.Barrier(size), [None] * size) for _ in range(num_stages)]  # by stage
        self._chains = [StageChain(num_stages) for _ in range(size)]  # by number in the stage
        self.workers: list[Worker] = []
        """By rank, from ``start`` on: for tests that look inside."""

    def start(self) -> KVCapacity:
        """Start the ranks, stage by stage."""
        self.workers = self._wait([thread.submit(self._make_worker, rank) for rank, thread in enumerate(self._threads)])
        self._call_each(Worker.load_model)
        self._call_each(Worker.build_model_runner)
        num_blocks = min(profile.num_blocks for profile in self._call_each(Worker.profile_memory))
        self._call_each(lambda worker: worker.allocate_kv_cache(num_blocks))
        self._call_each(Worker.capture_graphs)
        self._call_each(Worker.end_start)
        return self.workers[0].capacity

    def _make_worker(self, rank: int) -> Worker:
        layout = self._layout
        stage, tensor_rank = layout.get_stage(rank), layout.get_tensor_rank(rank)
        size, num_stages = layout.tensor_parallel_size, layout.pipeline_parallel_size
        parallel = ThreadRank(tensor_rank, size, self._groups[stage]) if size > 1 else None
        link = ThreadStageLink(stage, self._chains[tensor_rank]) if num_stages > 1 else None
        return Worker(self.config, parallel, link)

    def execute_model(self, step: SchedulerOutput) -> None:
        """Queue the step's model on each rank."""
        self._model_futures = self._submit_each(lambda worker: worker.execute_model(step))

    def sample_tokens(self, masks: TokenMasks | None = None) -> StepFuture:
        """Queue the rest of the step on each rank."""
        model_futures = dict(zip(self.workers, self._model_futures, strict=True))

        def run(worker: Worker) -> ModelRunnerOutput:
            model_futures[worker].result()  # raises what the model raised
            return worker.sample_tokens(masks).result()

        return _RankedStep(self._submit_each(run), self._layout)

    def collective_rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Call a control method of every worker."""
        return self._call_each(lambda worker: worker.control.call_method(method, arguments))

    def shutdown(self) -> None:
        """Finish the steps in flight and drop the workers."""
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self.workers = []

    def _submit_each(self, function: Callable[[Worker], _T]) -> list[Future[_T]]:
        def run(worker: Worker) -> _T:
            try:
                return function(worker)
            except BaseException:
                for group in self._groups:
                    group.barrier.abort()  # or the others wait for this one
                raise

        return [thread.submit(run, worker) for thread, worker in zip(self._threads, self.workers, strict=True)]

    def _call_each(self, function: Callable[[Worker], _T]) -> list[_T]:
        return self._wait(self._submit_each(function))

    @staticmethod
    def _wait(futures: list[Future[_T]]) -> list[_T]:
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


class _RankedStep:
    def __init__(self, futures: list[Future[ModelRunnerOutput]], layout: RankLayout) -> None:
        self._futures = futures
        self._layout = layout

    def result(self) -> ModelRunnerOutput:
        outputs = ThreadRanksExecutor._wait(self._futures)[self._layout.output_rank :]  # the last stage's
        tokens = [(each.sampled_token_ids.tolist(), each.num_sampled_tokens.tolist()) for each in outputs]
        assert all(each == tokens[0] for each in tokens), f"ranks sampled different tokens: {tokens}"
        return outputs[0]

    def done(self) -> bool:
        return all(future.done() for future in self._futures)
