"""The ranks of one host: processes of this one, with which it shares memory. Imports nothing heavy: they start before
this process imports torch."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quire.core.env import child_environment
from quire.core.errors import ConfigError, WorkerDiedError
from quire.core.worker.multiproc.broadcast_ring import RingWriter, SharedMemory
from quire.core.worker.multiproc.frames import MASK_BLOCK, NEW_RING, NEXT_MESSAGE, STATUS
from quire.core.worker.multiproc.rank_group import RankEnd, RankGroup
from quire.core.worker.multiproc.rank_launch import (
    DUMP_SIGNAL,
    RankPlace,
    describe_exit_status,
    is_stopped,
    launch_rank,
)
from quire.core.worker.multiproc.rank_status import RankStatus

__all__ = ["RankProcesses"]

_RING_BYTES = 1 << 20
_GLOO_STAYS_ON_THIS_HOST = MappingProxyType({"GLOO_SOCKET_IFNAME": "lo"})
"""It looks for the host's name otherwise, which a container need not know."""
_END_WAIT_S = 3.0
_CAUSE_WAIT_S = 1.0
"""How long the end of a socket may come before the end of its process is seen."""
_STACKS_S = 0.3


class RankProcesses(RankGroup):
    """Processes that import what they need from construction on, and end with this one, however it ends.

    Messages go through one ring in shared memory; a ring that is full is replaced by a larger one, so that sending
    never waits.
    """

    def __init__(self, size: int, device: str = "auto") -> None:
        """``device``: unless it is ``cpu``, each initializes the GPU of its number, if it is there."""
        super().__init__(size)
        self._device = device
        self._ring = RingWriter(_RING_BYTES, size)
        self._processes: list[subprocess.Popen[bytes]] = []  # by rank
        listener = socket.create_server(("127.0.0.1", 0), backlog=size)
        # The first rank inherits the socket: nothing else can take the port.
        self.store_address = listener.getsockname()
        self._shutdown = threading.Event()
        started = threading.Event()
        self._errors: list[OSError] = []
        # Ranks are killed when the thread that started them ends: one that lasts as long as they do.
        self._launcher = threading.Thread(
            target=self._launch, args=(size, listener, started), name="quire-rank-launcher", daemon=True
        )
        self._launcher.start()
        started.wait()
        listener.close()
        if self._errors:
            self.kill()
            raise ConfigError(f"the process of a rank cannot be started: {self._errors[0]}")
        self._send(NEW_RING, self._ring.memory)
        memory = SharedMemory.allocate(8 * size * RankStatus.NUM_VALUES, "states of workers")
        values: NDArray[np.int64] = np.frombuffer(memory.map, np.int64).reshape(size, -1)
        self.statuses = [RankStatus(each) for each in values]
        self._send(STATUS, memory)
        memory.close()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self._processes]

    def broadcast(self, data: bytes) -> None:
        """Send a message to every rank. Raises ``WorkerDiedError`` where one has ended."""
        if not self._ring.try_write(data):
            self._ring.memory.close()
            size = max(2 * self._ring.capacity, 4 * len(data))
            self._ring = RingWriter(size, self.size)
            self._send(NEW_RING, self._ring.memory)
            assert self._ring.try_write(data)
        self._send(NEXT_MESSAGE)

    def send_mask_block(self, memory: SharedMemory) -> None:
        """Let every rank map ``memory``, for the messages after this."""
        self._send(MASK_BLOCK, memory)

    def find_stopped(self) -> list[int]:
        """Ranks that a signal or a debugger has stopped."""
        return [rank for rank, process in enumerate(self._processes) if is_stopped(process.pid)]

    def dump_stacks(self) -> str:
        """Have every rank write the stacks of its threads to the log."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(DUMP_SIGNAL)
        time.sleep(_STACKS_S)
        return "the log"

    def shutdown(self) -> None:
        """Let every rank end, and kill those that do not. Idempotent."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)  # the end of its messages
        self._wait(range(len(self._processes)), _END_WAIT_S)
        self.kill()

    def kill(self) -> None:
        """End every rank at once. Idempotent."""
        for process in self._processes:
            process.kill()
        for connection, process in zip(self._connections, self._processes, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_WAIT_S)
            connection.socket.close()
        self._ring.memory.close()
        self._shutdown.set()

    def _find_ends(self, ranks: Sequence[int]) -> list[RankEnd]:
        self._wait(ranks, _CAUSE_WAIT_S)
        statuses = [process.poll() for process in self._processes]
        return [
            RankEnd(rank, status, describe_exit_status(status))
            for rank, status in enumerate(statuses)
            if status is not None
        ]

    def _wait(self, ranks: Sequence[int], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[rank].wait(max(0.0, deadline - time.monotonic()))

    def _launch(self, size: int, listener: socket.socket, started: threading.Event) -> None:
        # Blocked, and so in the ranks until they ignore them: Ctrl-C reaches the whole group, also while Python starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        environment = {**_GLOO_STAYS_ON_THIS_HOST, **child_environment()}
        try:
            for rank in range(size):
                ours, theirs = socket.socketpair()
                place = RankPlace(rank, size, self._device, rank, size, "ring")
                with theirs:
                    process = launch_rank(place, theirs, None if rank else listener, environment)
                self._processes.append(process)
                self._add_connection(ours)
        except OSError as error:
            self._errors.append(error)
        started.set()
        self._shutdown.wait()

    def _send(self, kind: bytes, memory: SharedMemory | None = None) -> None:
        for connection in self._connections:
            try:
                if memory is None:
                    connection.socket.sendall(kind)
                else:
                    socket.send_fds(connection.socket, [kind], [memory.fd])
            except OSError:
                raise WorkerDiedError(self.describe_end([connection.rank])) from None
