"""What tests and debugging may look at inside a scheduler."""

from __future__ import annotations

from typing import NamedTuple

from quire.core.contracts.kv import KVAllocator
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.speculation import Speculation
from quire.core.sched.waiting_queue import ForkGroups, WaitingQueue

__all__ = ["SchedulerDebugState"]


class SchedulerDebugState(NamedTuple):
    """The scheduler's live parts, for tests and debugging: to look at, not to change."""

    running: RunningBatch
    waiting: WaitingQueue
    fork_groups: ForkGroups
    allocator: KVAllocator
    speculation: Speculation | None
