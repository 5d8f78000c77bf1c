"""The processes of the ranks, as their parent holds them: how they are started, told, heard and ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quire.core.env import child_environment
from quire.core.errors import ConfigError, WorkerDiedError
from quire.core.worker.multiproc.broadcast_ring import RingWriter, SharedMemory
from quire.core.worker.multiproc.rank_layout import RankLayout

__all__ = ["DUMP_SIGNAL", "MASK_BLOCK", "NEW_RING", "NEXT_MESSAGE", "STATUS", "RankMessage", "RankProcesses"]

NEXT_MESSAGE, NEW_RING, MASK_BLOCK, STATUS = b".", b"r", b"m", b"s"
"""What a rank is sent over its socket: that a message is in the ring, or the descriptor of shared memory."""
DUMP_SIGNAL = signal.SIGUSR1
_RING_BYTES = 1 << 20
_GLOO_STAYS_ON_THIS_HOST = MappingProxyType({"GLOO_SOCKET_IFNAME": "lo"})
"""It looks for the host's name otherwise, which a container need not know."""
_END_WAIT_S = 3.0
_CAUSE_WAIT_S = 1.0
"""How long the end of a socket may come before the end of its process is seen."""
_FRAME_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankMessage:
    """What a rank sent."""

    rank: int
    data: bytes


@dataclass(slots=True)
class _RankProcess:
    rank: int
    process: subprocess.Popen[bytes]
    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)


class RankProcesses:
    """``size`` processes, which import what they need from construction on, and end with this one, however it ends.

    Every message goes to all of them, through one ring in shared memory; a ring that is full is replaced by a larger
    one, so that sending never waits. Each answers over a socket of its own, whose end is the end of the process.
    """

    def __init__(self, size: int, device: str = "auto") -> None:
        """``device``: unless it is ``cpu``, each initializes the GPU of its number, if it is there."""
        self.size = size
        self.layout = RankLayout(size)
        """How messages name the ranks: set when it is known, which is after the start of the processes."""
        self._device = device
        self._ring = RingWriter(_RING_BYTES, size)
        listener = socket.create_server(("127.0.0.1", 0), backlog=size)
        self.store_port: int = listener.getsockname()[1]
        """Of the socket that the first rank inherits: nothing else can take the port."""
        self._poll = select.poll()
        self._ranks: list[_RankProcess] = []
        self._by_fd: dict[int, _RankProcess] = {}
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
        memory = SharedMemory.allocate(size, "states of workers")
        self._status: NDArray[np.uint8] = np.frombuffer(memory.map, np.uint8)  # by rank, written by the ranks
        self._send(STATUS, memory)
        memory.close()

    @property
    def is_compiling(self) -> bool:
        """Whether a rank compiles a kernel. Never waits."""
        return bool(self._status.any())

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [rank.process.pid for rank in self._ranks]

    def broadcast(self, data: bytes) -> None:
        """Send a message to every rank. Raises ``WorkerDiedError`` where one has ended."""
        if not self._ring.try_write(data):
            self._ring.memory.close()
            size = max(2 * self._ring.capacity, 4 * len(data))
            self._ring = RingWriter(size, len(self._ranks))
            self._send(NEW_RING, self._ring.memory)
            assert self._ring.try_write(data)
        self._send(NEXT_MESSAGE)

    def send_memory(self, kind: bytes, memory: SharedMemory) -> None:
        """Let every rank map ``memory``, for the messages after this."""
        self._send(kind, memory)

    def receive(self, seconds: float) -> list[RankMessage]:
        """What ranks sent, in the order of each; waits ``seconds`` at most for the first of it. Raises
        ``WorkerDiedError`` when a rank has ended and all that it had sent was returned."""
        ended: list[_RankProcess] = []
        messages: list[RankMessage] = []
        for fd, _ in self._poll.poll(seconds * 1e3):
            rank = self._by_fd[fd]
            if not self._read_socket(rank):
                ended.append(rank)
            messages += _take_messages(rank)
        if ended and not messages:
            raise WorkerDiedError(self.describe_end([rank.rank for rank in ended]))
        return messages

    def describe_end(self, ranks: Sequence[int]) -> str:
        """What ended the first of these ranks that has ended: one line that names it."""
        deadline = time.monotonic() + _CAUSE_WAIT_S
        for rank in (self._ranks[number] for number in ranks):
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        ended = [self._ranks[number] for number in ranks if self._ranks[number].process.returncode is not None]
        if not ended:
            return f"{self.layout.describe_rank(ranks[0])} closed its socket"
        # One that a signal ended comes first: another may have ended because of it.
        rank = min(ended, key=lambda each: each.process.returncode >= 0)
        status, who = rank.process.returncode, self.layout.describe_rank(rank.rank, f"process {rank.process.pid}")
        if status >= 0:
            return f"{who} ended with status {status}; its lines in the log say why"
        hint = ", as the kernel does where the host's memory runs out" if status == -signal.SIGKILL else ""
        return f"{who} was killed by {signal.Signals(-status).name}{hint}"

    def find_ended(self) -> list[int]:
        """Ranks whose process has ended."""
        return [rank.rank for rank in self._ranks if rank.process.poll() is not None]

    def find_stopped(self) -> list[int]:
        """Ranks that a signal or a debugger has stopped."""
        return [rank.rank for rank in self._ranks if _is_stopped(rank.process.pid)]

    def dump_stacks(self) -> None:
        """Have every rank write the stacks of its threads to the log."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(DUMP_SIGNAL)

    def shutdown(self) -> None:
        """Let every rank end, and kill those that do not. Idempotent."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.socket.shutdown(socket.SHUT_WR)  # the end of its messages
        deadline = time.monotonic() + _END_WAIT_S
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every rank at once. Idempotent."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(_END_WAIT_S)
            rank.socket.close()
        self._ring.memory.close()
        self._shutdown.set()

    def _launch(self, size: int, listener: socket.socket, started: threading.Event) -> None:
        # Blocked, and so in the ranks until they ignore them: Ctrl-C reaches the whole group, also while Python starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for rank in range(size):
                self._start_process(rank, size, listener)
        except OSError as error:
            self._errors.append(error)
        started.set()
        self._shutdown.wait()

    def _start_process(self, rank: int, size: int, listener: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        listener_fd = listener.fileno() if rank == 0 else -1
        words = [str(word) for word in (rank, size, self._device, theirs.fileno(), listener_fd, os.getpid())]
        process = subprocess.Popen(
            [sys.executable, "-m", "quire.core.worker.multiproc.rank_main", *words],
            env={**_GLOO_STAYS_ON_THIS_HOST, **child_environment()},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *([listener_fd] if listener_fd >= 0 else [])],
        )
        theirs.close()
        self._ranks.append(_RankProcess(rank, process, ours))
        self._by_fd[ours.fileno()] = self._ranks[-1]
        self._poll.register(ours.fileno(), select.POLLIN)

    def _send(self, kind: bytes, memory: SharedMemory | None = None) -> None:
        for rank in self._ranks:
            try:
                if memory is None:
                    rank.socket.sendall(kind)
                else:
                    socket.send_fds(rank.socket, [kind], [memory.fd])
            except OSError:
                raise WorkerDiedError(self.describe_end([rank.rank])) from None

    @staticmethod
    def _read_socket(rank: _RankProcess) -> bool:
        """Take what has arrived. False at the end of it."""
        try:
            data = rank.socket.recv(1 << 18)
        except OSError:
            return False
        rank.received += data
        return bool(data)


def _take_messages(rank: _RankProcess) -> list[RankMessage]:
    messages, received = [], rank.received
    while len(received) >= _FRAME_BYTES:
        end = _FRAME_BYTES + int.from_bytes(received[:_FRAME_BYTES], "little")
        if len(received) < end:
            break
        messages.append(RankMessage(rank.rank, bytes(received[_FRAME_BYTES:end])))
        del received[:end]
    return messages


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
