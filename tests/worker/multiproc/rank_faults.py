"""A worker that does wrong when it is told to: imported by ranks, which are processes of their own."""

from __future__ import annotations

import time

from quire.core.errors import CheckpointError
from quire.core.worker.multiproc.executor import MultiprocExecutor
from quire.core.worker.ray.executor import RayExecutor
from quire.core.worker.worker import Worker


class FaultyWorker(Worker):
    """What ``set_fault`` names goes wrong, on one rank or on all."""

    def __init__(self, config, parallel=None, link=None):
        super().__init__(config, parallel, link)
        self.rank = self.describe_worker().rank
        self.fault, self.faulty_rank = "", None
        self.control.add_method("set_fault", self.set_fault)
        self.control.add_method("read_file", self.read_file)

    def set_fault(self, fault: str, rank: int | None = None) -> None:
        self.fault, self.faulty_rank = fault, rank

    def read_file(self, path: str) -> None:
        raise CheckpointError(f"{path} is no checkpoint") if path else OSError("forced")

    def load_model(self):
        super().load_model()
        self._model.register_forward_pre_hook(self.raise_in_model)

    def raise_in_model(self, *arguments):
        if self.has_fault("raise in model"):
            raise ValueError("forced")

    def has_fault(self, fault):
        return self.fault == fault and self.faulty_rank in (None, self.rank)

    @property
    def num_unchecked_tokens(self):
        return 0

    def has_memory_for(self, num_tokens):
        return not self.has_fault("memory") or num_tokens <= 24

    def execute_model(self, step):
        if self.has_fault("raise"):
            raise ValueError("forced")
        if self.has_fault("hang"):
            time.sleep(10_000)
        super().execute_model(step)


class WorkerAskedAhead(FaultyWorker):
    """It is sent a step before the one before has ended, as any other worker."""

    num_unchecked_tokens = Worker.num_unchecked_tokens

    def sample_tokens(self, masks=None):
        if self.has_fault("raise, then hang"):
            self.fault = "hang"  # as one that waits for the others in the next step
            time.sleep(1)  # until that is here
            raise ValueError("forced")
        return super().sample_tokens(masks)


class ExecutorAhead(MultiprocExecutor):
    """Its workers are those."""

    worker_target = "rank_faults:WorkerAskedAhead"


class FaultyExecutor(MultiprocExecutor):
    """Its workers go wrong."""

    worker_target = "rank_faults:FaultyWorker"


class FaultyRayExecutor(RayExecutor):
    """The same on the nodes of a Ray cluster."""

    worker_target = "rank_faults:FaultyWorker"
