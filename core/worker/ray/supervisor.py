"""What runs in a Ray actor on the node of each rank: it starts the process of the rank, and watches it.

It imports nothing heavy: the model is the process's. So what can only be seen and done on the node (how the process
ended, whether it is stopped) is there to be asked while the process hangs or after it ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from quire.core.env import child_environment
from quire.core.version import __version__
from quire.core.worker.multiproc.rank_launch import DUMP_SIGNAL, RankPlace, is_stopped, launch_rank
from quire.core.worker.ray.connection import connect_rank, listen
from quire.core.worker.ray.interface import find_interface

__all__ = ["NodeFacts", "RankSupervisor", "read_versions"]

_POLL_MS = 250
_END_WAIT_S = 3.0
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR if hasattr(select, "POLLRDHUP") else select.POLLHUP


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a supervisor says of its node before its rank starts."""

    versions: dict[str, str]
    """Of what has to be the same on every node."""
    gpu_ids: list[str]
    """Those that Ray gave this actor."""
    log_path: str
    """Of the file to which the rank writes."""


def read_versions() -> dict[str, str]:
    """Of what the ranks of an engine have to have alike, without importing it."""
    torch = next((dist.version for dist in metadata.distributions(name="torch")), "none")
    return {"quire": __version__, "torch": torch.partition("+")[0]}


class RankSupervisor:
    """Of one rank. Ray calls its methods one after the other."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None

    def __repr__(self) -> str:
        """What Ray writes before the lines of this actor's processes."""
        return f"rank {self._rank}"

    def read_facts(self) -> NodeFacts:
        """What the executor has to know before it starts the rank."""
        import ray

        log_path = ""
        with contextlib.suppress(OSError):
            log_path = os.readlink("/proc/self/fd/2")
        return NodeFacts(read_versions(), [str(gpu) for gpu in ray.get_gpu_ids()], log_path)

    def open_store(self, host: str) -> int:
        """Bind the socket over which this rank serves the store by which ranks find each other; returns its port."""
        self._listener = listen(host, 128)
        return int(self._listener.getsockname()[1])

    def start_rank(
        self,
        place: RankPlace,
        address: tuple[str, int],
        token: bytes,
        host: str,
        shared: Mapping[str, str],
        own: Mapping[str, str],
    ) -> int:
        """Connect to the executor at ``address`` and hand the connection to the process of the rank, whose number is
        returned. ``host``: this node, as others reach it. The process has the environment of the node, what of
        ``shared`` the node does not set, and ``own``."""
        connection = connect_rank(*address, place.rank, token)
        # Ray gives its workers a low priority, which the steps of a model should not have.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        interface = find_interface(host)
        gloo = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        environment = {**gloo, **shared, **child_environment(), **own}
        self._process = launch_rank(place, connection, self._listener, environment)
        if self._listener is not None:
            self._listener.close()
        threading.Thread(target=self._watch, args=(self._process, connection), daemon=True).start()
        return self._process.pid

    def get_exit_status(self, seconds: float) -> int | None:
        """How the process ended, if it does within ``seconds``."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(seconds)
        return None

    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process."""
        return self._process is not None and is_stopped(self._process.pid)

    def dump_stacks(self) -> None:
        """Have the process write the stacks of its threads to its log."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(DUMP_SIGNAL)

    @staticmethod
    def _watch(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        """End the process some seconds after the executor has closed the connection, or is gone; end the connection
        with the process. The process may be stopped, or wait for another rank for ever: it cannot look."""
        poll = select.poll()
        poll.register(connection.fileno(), _GONE)
        while process.poll() is None:
            if poll.poll(_POLL_MS):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_WAIT_S)
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                process.wait()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
