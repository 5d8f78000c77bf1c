"""The process of an engine core: its parent's handle of it, and its entry point.

It is ``python -m quire.core.engine.process FOLDER DEVICE RANKS PARENT``. This module imports nothing heavy, so that the
process can be started before anything else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from quire.core.env import child_environment
from quire.core.worker.multiproc.rank_launch import DUMP_SIGNAL, MAX_EARLY_RANKS, is_stopped

__all__ = ["EngineProcess", "main"]

_PARENT_POLL_S = 0.5
_KILL_WAIT_S = 10.0
"""A process that waits for a device that does not answer may outlive SIGKILL: no end waits for it."""
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EngineProcess:
    """Starts when constructed: it imports what it needs, and initializes a GPU unless ``device`` is ``cpu``, while its
    configuration is built. Where ``num_ranks`` workers share a model, a process of each does so in its place; not where
    the executor is ``ray``, which finds them a host. As a context manager it ends the process."""

    def __init__(self, device: str = "auto", num_ranks: int = 1, executor: str = "auto") -> None:
        if executor == "ray":
            device, num_ranks = "cpu", 1
        # Blocked, and so in the child until it ignores them: Ctrl-C reaches the whole group, also while Python starts.
        mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            self.folder = tempfile.mkdtemp(prefix="quire-")  # of the sockets: only this user can enter
            command = [sys.executable, "-m", __name__, self.folder, device, str(num_ranks), str(os.getpid())]
            self._child = subprocess.Popen(command, env=child_environment(), stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def exit_status(self) -> int | None:
        """How it ended; None while it runs."""
        return self._child.poll()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger stopped it; False where that cannot be known."""
        return is_stopped(self.pid)

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to the log, even while no Python code can run in it."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(DUMP_SIGNAL)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it if that does not come. May run in a thread."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End it at once, and clear up. Idempotent."""
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_KILL_WAIT_S)
        self.remove_folder()

    def kill_at_once(self) -> None:
        """``kill`` for a signal handler that is about to end this process: it takes no lock and waits for nothing."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL)
        self.remove_folder()

    def remove_folder(self) -> None:
        """Remove the sockets' folder. Once both ends are connected nothing needs it. Idempotent."""
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    """Entry point. Ctrl-C and SIGTERM reach the whole group; the parent decides when this process stops."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
    folder, device, num_ranks, parent_pid = sys.argv[1:]
    watcher = threading.Thread(target=_end_with_parent, args=(folder, int(parent_pid)), daemon=True)
    watcher.start()
    ranks = None
    if 1 < int(num_ranks) <= MAX_EARLY_RANKS:
        from quire.core.errors import ConfigError
        from quire.core.worker.multiproc.rank_processes import RankProcesses

        with contextlib.suppress(ConfigError):  # it comes again when the executor starts, and is reported
            ranks = RankProcesses(int(num_ranks), device)
            device = "cpu"
    from quire.core.engine.core_process import EngineCoreProcess  # seconds

    return EngineCoreProcess(folder, device, int(parent_pid), ranks).run()


def _end_with_parent(folder: str, parent_pid: int) -> None:
    """End this process when its parent is gone, even while it imports, loads a model or hangs in a step, and remove the
    folder that the parent left."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
