"""The entry point of a rank's process, ``python -m ...multiproc.rank_main RANK SIZE ...``: see ``launch_rank``.

It imports nothing heavy before it is sure to end with its parent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time

from quire.core.worker.multiproc.rank_launch import DUMP_SIGNAL, RankPlace
from quire.core.worker.startup_timer import StartupTimer

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Entry point. Ctrl-C and SIGTERM reach the whole group; the parent decides when this process ends."""
    timer = StartupTimer()
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    place = RankPlace.from_words(sys.argv[1:-3])
    socket_fd, store_fd, parent_pid = (int(word) for word in sys.argv[-3:])
    _end_with_parent(parent_pid)
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
    from quire.core.worker.multiproc.rank_channel import open_channel  # seconds
    from quire.core.worker.multiproc.rank_worker import RankWorker

    return RankWorker(place, open_channel(place, socket.socket(fileno=socket_fd)), store_fd, timer).run()


def _end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, also while it is stopped or hangs; a thread looks too,
    where there is no such kernel."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="quire-parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
