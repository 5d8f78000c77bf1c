"""Fills the masks of a step in a thread, so that a grammar that hangs does not take the engine with it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.structured_output import MaskRequest, StructuredOutputBackend
from quire.core.plugin.quarantine import NEVER_CONTAINED, class_path

__all__ = ["MaskFiller"]

_log = logging.getLogger("quire.structured_output")
_FIRST_WORDS = 32
_Call = tuple[Sequence[MaskRequest], NDArray[np.int32], "Future[None]"]


class MaskFiller:
    """Calls ``StructuredOutputBackend.fill_masks`` and waits for it, but not for ever."""

    def __init__(self, backend: StructuredOutputBackend, time_limit_s: float) -> None:
        self._backend = backend
        self._time_limit_s = time_limit_s
        self._queue: queue.SimpleQueue[_Call | None] | None = None  # of a thread; None: one is started when needed
        self._catches_up = True
        self.num_lost_threads = 0
        """Calls that did not return in time, and may still write into the block that they were given."""

    def fill_masks(self, requests: Sequence[MaskRequest], block: NDArray[np.int32]) -> dict[int, str]:
        """Fill rows of ``block``. Returns, by index into ``requests``, why those that have no masks have failed.

        Where the call raises or does not return, the request that was being filled is to blame. The others are filled
        by further calls; a backend that fills all requests at once may be asked for one after the other.
        """
        failures: dict[int, str] = {}
        pending = list(range(len(requests)))
        while pending:
            reason = self._call([requests[index] for index in pending], block)
            left = [index for index in pending if not requests[index].is_filled]
            if not left:
                break
            blamed = [index for index in left if requests[index].is_started]
            if not blamed:
                if len(pending) > 1:  # a call for all at once says nothing of who is to blame
                    for index in left:
                        if reason := self._call([requests[index]], block):
                            failures[index] = reason
                    break
                blamed = left
            failures.update(dict.fromkeys(blamed, reason or "it left a mask unfilled"))
            pending = [index for index in left if index not in failures]
        rows = np.array([request.first_row for request in requests], np.int64)
        # Most rows allow one of the first tokens: the other words of these need not be read.
        for index in np.flatnonzero(block[rows, :_FIRST_WORDS].any(axis=1) == 0).tolist():
            if index not in failures and not block[rows[index]].any():
                failures[index] = "it allows no token"
        return failures

    def begin_catch_up(self) -> None:
        """The engine waits for tokens from now on. A backend that raises is not told so again."""
        if self.num_lost_threads or not self._catches_up:
            return
        try:
            self._backend.begin_catch_up()
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._catches_up = False
            _log.error("%s: begin_catch_up failed, and is not called again", class_path(self._backend), exc_info=error)

    def shutdown(self) -> None:
        """Let the thread end."""
        if self._queue is not None:
            self._queue.put(None)

    def _call(self, requests: Sequence[MaskRequest], block: NDArray[np.int32]) -> str:
        """One call, in the thread unless the backend is sure to return. Why it failed; empty if it did not."""
        if self._backend.fills_soon:
            try:
                self._backend.fill_masks(requests, block)
                return ""
            except NEVER_CONTAINED:
                raise
            except BaseException as error:
                return self._note_failure(error)
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(self._queue,), name="quire-grammar-masks", daemon=True).start()
        future: Future[None] = Future()
        self._queue.put((requests, block, future))
        try:
            future.result(self._time_limit_s)
            return ""
        except TimeoutError as error:
            if future.done():
                return self._note_failure(error)
            self._queue.put(None)  # should the call ever return, its thread ends
            self._queue = None
            self.num_lost_threads += 1
            name = class_path(self._backend)
            _log.error("%s: a mask was not filled in %.0f s; its thread is given up", name, self._time_limit_s)
            return f"its grammar did not return in {self._time_limit_s:.0f} s"
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            return self._note_failure(error)

    def _note_failure(self, error: BaseException) -> str:
        _log.error("%s: a mask could not be filled", class_path(self._backend), exc_info=error)
        return "its grammar failed; the engine's log says why"

    def _run(self, calls: queue.SimpleQueue[_Call | None]) -> None:
        while (call := calls.get()) is not None:
            requests, block, future = call
            try:
                self._backend.fill_masks(requests, block)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
