"""Checks constraints in the API process, before their requests reach the engine core."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from quire.core.config import EngineConfig
from quire.core.errors import InvalidRequestError
from quire.core.structured_output.compile_process import CompileProcess, CompileTemplate
from quire.core.structured_output.compiler import make_cache_key
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["ConstraintChecker"]

_NUM_PROCESSES = 2
"""So that one constraint that takes its whole second does not hold up every other."""
_MAX_VERDICTS = 4096


class ConstraintChecker:
    """Has every constraint compiled once in a process that can be killed, off the event loop. The process that has the
    backend is started by ``start``, or when the first constraint comes. Equal constraints share one check, and its
    verdict."""

    def __init__(self, config: EngineConfig) -> None:
        self._verdicts: OrderedDict[bytes, asyncio.Future[str]] = OrderedDict()  # why it is refused; empty: it is not
        self._has_backend = config.plugin("structured_output").name != "none"
        self._template = CompileTemplate(config)
        self._processes: queue.SimpleQueue[CompileProcess] = queue.SimpleQueue()
        self._all_processes: list[CompileProcess] = []
        self._threads: ThreadPoolExecutor | None = None
        self.num_refused = 0
        """Requests that were refused for their constraint."""
        self.check_seconds = 0.0

    def start(self) -> None:
        """Begin to load the backend, so that the first constraint does not wait for it. Waits for nothing."""
        if self._has_backend:
            with contextlib.suppress(OSError):  # the first constraint tries again
                self._template.start()

    async def check_constraint(self, params: StructuredOutputsParams | None) -> None:
        """Raises ``InvalidRequestError`` if there is a constraint that cannot be compiled within the limits."""
        if params is None:
            return
        key = make_cache_key(params)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = asyncio.get_running_loop().run_in_executor(
                self._start_threads(), self._check, params
            )
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(key)
        # Shielded: a caller that leaves does not end the check for those who wait for the same.
        try:
            reason = await asyncio.shield(verdict)
        except Exception:  # no process could be started: nothing is known of the constraint
            self._verdicts.pop(key, None)
            raise
        if reason:
            self.num_refused += 1
            raise InvalidRequestError(reason, "structured_outputs")

    def close(self) -> None:
        """End the processes. Idempotent."""
        for process in self._all_processes:
            process.close()
        self._template.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _start_threads(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_PROCESSES, thread_name_prefix="quire-constraints")
            self._all_processes = [CompileProcess(self._template) for _ in range(_NUM_PROCESSES)]
            for process in self._all_processes:
                self._processes.put(process)
        return self._threads

    def _check(self, params: StructuredOutputsParams) -> str:
        """In a thread: there are as many as processes."""
        start, process = time.monotonic(), self._processes.get()
        try:
            process.check_constraint(params)
            return ""
        except InvalidRequestError as error:
            return str(error)
        finally:
            self.check_seconds += time.monotonic() - start
            self._processes.put(process)
