"""Starts the process of a rank, and tells how a process is and how it ended. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["DUMP_SIGNAL", "MAX_EARLY_RANKS", "RankPlace", "describe_exit_status", "is_stopped", "launch_rank"]

DUMP_SIGNAL = signal.SIGUSR1
"""Makes the process of a rank write the stacks of its threads to its standard error."""
MAX_EARLY_RANKS = 16
"""More are started when the configuration has been checked."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank a process is, and where."""

    rank: int
    size: int
    device: str
    """Unless it is ``cpu``, the process initializes its GPU as soon as it starts."""
    host_rank: int
    """Its number among the ranks of its host, and that of its GPU among those it can see."""
    host_size: int
    """Ranks of its host."""
    channel: Literal["ring", "stream"]
    """How messages come over its socket: a byte for each in shared memory, or the whole of it."""

    @property
    def words(self) -> list[str]:
        """For a command line."""
        return [*map(str, (self.rank, self.size, self.device, self.host_rank, self.host_size)), self.channel]

    @classmethod
    def from_words(cls, words: list[str]) -> RankPlace:
        """What ``words`` were made from."""
        rank, size, device, host_rank, host_size, channel = words
        return cls(int(rank), int(size), device, int(host_rank), int(host_size), channel)  # type: ignore[arg-type]


def launch_rank(
    place: RankPlace, connection: socket.socket, listener: socket.socket | None, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process of a rank, which ends with the thread that calls this. It talks to its executor over
    ``connection``; the first rank serves the store by which ranks find each other over ``listener``."""
    listener_fd = -1 if listener is None else listener.fileno()
    fds = [connection.fileno(), listener_fd]
    return subprocess.Popen(
        [sys.executable, "-m", "quire.core.worker.multiproc.rank_main", *place.words, *map(str, (*fds, os.getpid()))],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        pass_fds=[fd for fd in fds if fd >= 0],
    )


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process; False where that cannot be known."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def describe_exit_status(status: int) -> str:
    """How a process with this status, as ``subprocess`` has it, ended: to be put behind its name."""
    if status >= 0:
        return f"ended with status {status}; its lines in the log say why"
    hint = ", as the kernel does where the host's memory runs out" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
