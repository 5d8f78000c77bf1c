"""SIGTERM and SIGINT, from the first import of ``quire serve`` to the end of the last request.

This module imports nothing heavy, so that signals are handled before anything else happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]

_CAUGHT = (signal.SIGTERM, signal.SIGINT)
_LAST_SIGNAL = 3


class StopSignals:
    """A context manager that handles SIGTERM and SIGINT in the main thread.

    Until ``deliver_to_loop``, a signal ends this process at once, with status 128 plus its number: by no exception,
    since the signal may arrive inside an import or a callback that would swallow it. After that signals arrive in a
    queue of the event loop, for an orderly end; the third one ends the process at once, should the loop be blocked.
    """

    def __init__(self) -> None:
        self._clean_up: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: asyncio.Queue[int] | None = None
        self._num_delivered = 0
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._handlers_before = {number: signal.signal(number, self._handle) for number in _CAUGHT}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def call_before_exit(self, clean_up: Callable[[], None]) -> None:
        """Call ``clean_up`` before a signal ends the process. It must not wait: it runs between two instructions."""
        self._clean_up = clean_up

    def deliver_to_loop(self) -> asyncio.Queue[int]:
        """From now on, put the numbers of signals into this queue of the running event loop."""
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        return self._queue

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._loop is not None and self._queue is not None:
            self._num_delivered += 1
            if self._num_delivered < _LAST_SIGNAL:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, number)
                return
        if self._clean_up is not None:
            with contextlib.suppress(Exception):
                self._clean_up()
        state = "starting" if self._loop is None else "stopping"
        # print() could be the very call that the signal interrupted: its buffer must not be entered twice
        os.write(2, f"quire: ended by {signal.Signals(number).name} while {state}\n".encode())
        os._exit(128 + number)
