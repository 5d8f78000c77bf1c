"""Executor: where the workers run, and how a step reaches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quire.core.config import EngineConfig
from quire.core.contracts.kv import KVGroup
from quire.core.errors import UnsupportedError
from quire.core.messages import ModelRunnerOutput, SchedulerOutput, TokenMasks

__all__ = ["Executor", "KVCapacity", "StepFuture"]


class StepFuture(Protocol):
    """A step in flight."""

    def result(self) -> ModelRunnerOutput:
        """Wait for the step's tokens, and for no step behind it. Raises what the worker raised."""

    def done(self) -> bool:
        """Whether ``result`` would return at once."""


@dataclass(frozen=True, slots=True)
class KVCapacity:
    """What the workers agreed on after loading and profiling."""

    groups: tuple[KVGroup, ...]
    """Groups of layers that share block tables, in the order of ``BlockDiff.group``."""
    num_blocks: int
    """Blocks per group, the null block included, which padding writes to."""
    bytes_per_block: int
    """One block of every group, on one worker."""
    weight_bytes: int = 0
    """On one worker."""
    activation_bytes: int = 0
    """What the largest step needs beside weights and cache, on one worker; 0 where it is not profiled."""
    graph_bytes: int = 0
    """What CUDA graphs keep, on one worker; 0 without graphs."""


class Executor(ABC):
    """Runs steps on one or more workers, in the order in which they are given.

    At most ``ParallelConfig.max_in_flight_steps`` are in flight: launched, and their results not yet read. That is two
    without stages: the second may be launched before the first has sampled its tokens, which the worker then reads from
    its own request table.
    """

    def __init__(self, config: EngineConfig, options: Any = None) -> None:
        self.config = config
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @abstractmethod
    def start(self) -> KVCapacity:
        """Start workers, load the model, profile memory, allocate the KV cache, capture graphs."""

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        """Launch a step, ``execute_model`` and ``sample_tokens``, and return at once.

        Raises ``torch.OutOfMemoryError`` where the step does not fit into memory: its requests are then computed again
        in smaller steps. What fails later is raised by the future's ``result``, and ends the requests of the step.
        """
        self.execute_model(step)
        return self.sample_tokens()

    @abstractmethod
    def execute_model(self, step: SchedulerOutput) -> None:
        """Launch a step up to its logits and return at once. ``sample_tokens`` follows, before any other step; between
        the two the engine may wait for the tokens of the step before. Raises as ``execute_step`` does."""

    @abstractmethod
    def sample_tokens(self, masks: TokenMasks | None = None) -> StepFuture:
        """Launch the rest of the step that ``execute_model`` began, and return at once: sampling, the drafts for the
        next step, and the copies to the host. ``masks`` say which tokens some logits rows may become; their bits are
        not changed before the result of this step is read. Raises as ``execute_step`` does."""

    @property
    def is_compiling(self) -> bool:
        """Whether a worker compiles kernels at this moment, which the time limit of a step leaves out. Asked from
        another thread, and never waits."""
        return False

    @property
    def is_ending(self) -> bool:
        """Whether it has found that its workers cannot go on, and ends them before it raises why. Until then no step
        is taken for one that hangs. Asked from another thread, and never waits."""
        return False

    def allocate_mask_block(self, num_rows: int, num_words: int) -> NDArray[np.int32]:
        """Memory (num_rows, num_words) for the bits of ``TokenMasks``, from which the workers copy."""
        return np.empty((num_rows, num_words), np.int32)

    def collective_rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Call a control method of every worker, behind the steps that are launched and before any other; what each
        returned, by rank. The name is vLLM's.

        Raises ``InvalidRequestError`` where workers have no such method or it takes other arguments. What it raises on
        any worker is raised here, once all have ended it.
        """
        raise UnsupportedError(f"the executor {type(self).__name__} cannot call methods of its workers", "method")

    @abstractmethod
    def shutdown(self) -> None:
        """Stop every worker. Idempotent."""
