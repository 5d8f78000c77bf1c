"""A limit on what plugins do in the main thread while nothing else can watch them: when the process ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from quire.core.plugin.quarantine import PluginInterrupt

__all__ = ["interrupt_after"]

_AGAIN_S = 1.0


@contextlib.contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Raise ``PluginInterrupt`` inside once ``seconds`` have passed, and every second from then on. Without effect in
    another thread than the main one, and on systems without SIGALRM. A timer that was set before goes on afterwards."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise PluginInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
