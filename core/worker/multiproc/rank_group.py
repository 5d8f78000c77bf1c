"""The ranks of an executor as it sees them: a connection to each, what each notes of itself, and how each ended."""

from __future__ import annotations

import select
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.errors import WorkerDiedError
from quire.core.worker.multiproc.broadcast_ring import SharedMemory
from quire.core.worker.multiproc.frames import STATUS_FRAME, take_frames
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.multiproc.rank_status import RankStatus, find_behind

__all__ = ["RankConnection", "RankEnd", "RankGroup", "RankMessage"]

_MAX_RECEIVED_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RankMessage:
    """What a rank sent."""

    rank: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank ended."""

    rank: int
    status: int | None
    """As ``subprocess`` has it; None where what watched the process is gone as well."""
    reason: str
    """What is said behind its name."""

    @property
    def order(self) -> int:
        """The least first: ranks that lose the others raise or abort, so that one that something else ended is the
        cause."""
        if self.status is None or (self.status < 0 and self.status != -signal.SIGABRT):
            return 0
        return 1 if self.status < 0 else 2


@dataclass(slots=True)
class RankConnection:
    """The executor's end of the socket of a rank."""

    rank: int
    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    to_send: bytearray = field(default_factory=bytearray)

    def read(self) -> bool:
        """Take what has arrived. False at the end of it."""
        try:
            data = self.socket.recv(_MAX_RECEIVED_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.received += data
        return bool(data)


class RankGroup(ABC):
    """``size`` ranks. Every message goes to all of them; each answers over a socket of its own, whose end is the end
    of its process."""

    store_address: tuple[str, int]
    """Where the first rank serves the store by which ranks find each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.layout = RankLayout(size)
        """How messages name the ranks: set when it is known, which is after the start of the processes."""
        self.statuses: list[RankStatus] = []
        """By rank, as last heard of."""
        self._connections: list[RankConnection] = []  # by rank
        self._by_fd: dict[int, RankConnection] = {}
        self._poll = select.poll()

    def _add_connection(self, connection: socket.socket) -> None:
        """Of the next rank."""
        added = RankConnection(len(self._connections), connection)
        self._connections.append(added)
        self._by_fd[connection.fileno()] = added
        self._poll.register(connection.fileno(), select.POLLIN)

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """The processes, by rank, each as its host numbers it."""

    @property
    def is_compiling(self) -> bool:
        """Whether a rank compiles a kernel. Never waits."""
        return any(status.is_compiling for status in self.statuses)

    @abstractmethod
    def broadcast(self, data: bytes) -> None:
        """Send a message to every rank, without waiting for any. Raises ``WorkerDiedError`` where one has ended."""

    def send_mask_block(self, memory: SharedMemory) -> None:
        """Let every rank map ``memory``, for the messages after this."""
        raise NotImplementedError(f"{type(self).__name__} shares no memory with its ranks")

    def receive(self, seconds: float) -> list[RankMessage]:
        """What ranks sent, in the order of each; waits ``seconds`` at most for the first of it. Raises
        ``WorkerDiedError`` when a rank has ended and all that it had sent was returned."""
        ended: list[int] = []
        messages: list[RankMessage] = []
        for fd, events in self._poll.poll(seconds * 1e3):
            connection = self._by_fd[fd]
            if events & select.POLLOUT:
                self._flush(connection)
            if events & ~select.POLLOUT and not connection.read():
                ended.append(connection.rank)
            for frame in take_frames(connection.received):
                if frame[:1] == STATUS_FRAME:
                    self.statuses[connection.rank].values[:] = np.frombuffer(frame, np.int64, offset=1)
                else:
                    messages.append(RankMessage(connection.rank, frame[1:]))
        if ended and not messages:
            raise WorkerDiedError(self.describe_end(ended))
        return messages

    def _flush(self, connection: RankConnection) -> None:
        """Send what could not be sent before."""

    # ---- What is said of them.

    def describe_rank(self, rank: int) -> str:
        """A rank with its process: how messages name it."""
        return self.layout.describe_rank(rank, f"process {self.pids[rank]}")

    def describe_end(self, ranks: Sequence[int]) -> str:
        """What ended these ranks, whose sockets have ended, or another that they lost thereby: one line that names
        it."""
        ends = self._find_ends(ranks)
        if not ends:
            return f"{self.describe_rank(ranks[0])} closed its connection"
        cause = min(ends, key=lambda end: (end.order, end.rank))
        return f"{self.describe_rank(cause.rank)} {cause.reason}"

    def describe_hang(self, seconds: float, what: str) -> str:
        """Why ``what`` may not have ended for so long: one line. Stacks go to the log."""
        late = f"{what} has not ended for {seconds:.0f} s"
        if stopped := self.find_stopped():
            return f"{self.describe_rank(stopped[0])} is stopped (SIGSTOP, or a debugger): {late}"
        stages = [self.layout.list_stage(stage) for stage in range(self.layout.pipeline_parallel_size)]
        behind = find_behind(self.statuses, stages)
        where = self.dump_stacks()
        if not behind:
            return f"the ranks hang: {late}; their stacks are in {where}"
        names = " and ".join(self.describe_rank(rank) for rank in behind)
        hang, them = ("hangs", "it") if len(behind) == 1 else ("hang", "them")
        return f"{names} {hang}, and others wait for {them}: {late}; the stacks of all are in {where}"

    @abstractmethod
    def _find_ends(self, ranks: Sequence[int]) -> list[RankEnd]:
        """How ranks ended: all that have, after a while in which ``ranks`` may have it seen."""

    def find_ended(self) -> list[int]:
        """Ranks that have ended."""
        return [end.rank for end in self._find_ends(())]

    @abstractmethod
    def find_stopped(self) -> list[int]:
        """Ranks that a signal or a debugger has stopped."""

    @abstractmethod
    def dump_stacks(self) -> str:
        """Have every rank write the stacks of its threads to its log, and return what that log is."""

    @abstractmethod
    def shutdown(self) -> None:
        """Let every rank end, and kill those that do not. Idempotent."""

    @abstractmethod
    def kill(self) -> None:
        """End every rank at once. Idempotent."""
