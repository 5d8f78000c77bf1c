"""A metrics exporter in a thread of its own, where it holds up nothing but itself."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from quire.core.contracts.metrics import MetricsExporter
from quire.core.plugin.quarantine import Quarantine
from quire.core.stats import QuarantinedPlugin

__all__ = ["MAX_WAITING", "ExporterThread"]

MAX_WAITING = 16_384
"""Calls that may wait for an exporter: seconds of a busy server's, a few megabytes."""
_MAX_CALL_S = 7.0
"""After which a call is given up that no interrupt reaches, since it waits outside of Python."""
_Document = tuple[str, bytes] | None
_Call = tuple[Callable[..., Any], tuple[Any, ...], "Future[_Document] | None"]


class ExporterThread:
    """Makes the calls of one exporter in the order in which they were asked for. They are guarded: an exporter that
    raises, does not return or falls behind is quarantined, and is called no more.

    The thread starts with the first call. Its methods are called from one thread, which never waits.
    """

    def __init__(self, name: str, exporter: MetricsExporter, on_fault: Callable[[QuarantinedPlugin], None]) -> None:
        self.name = name
        self.exporter = exporter
        self._quarantine = Quarantine("metrics", name, on_fault)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._began_at: float | None = None  # the call that runs
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def is_active(self) -> bool:
        """Whether the exporter is still called."""
        return self._quarantine.is_active

    @property
    def thread_id(self) -> int | None:
        """Of the thread, once it has started."""
        return None if self._thread is None else self._thread.ident

    def report(self, function: Callable[..., None], *args: Any) -> None:
        """Call a method of the exporter, soon."""
        self._put((function, args, None))

    def render(self) -> Future[_Document]:
        """The exporter's document when all that was reported before is in it; None where it has none or is
        quarantined."""
        future: Future[_Document] = Future()
        self._put((_render_checked, (self.exporter,), future))
        return future

    def close(self) -> None:
        """Close the exporter when all that was reported before is taken, and end the thread. Idempotent; what is
        reported later is dropped."""
        if not self._is_closed:
            self._put((self.exporter.close, (), None))
            self._calls.put(None)
            self._is_closed = True

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _put(self, call: _Call) -> None:
        if self._quarantine.is_active:
            began_at, num_waiting = self._began_at, self._calls.qsize()
            if began_at is not None and time.monotonic() - began_at > _MAX_CALL_S:
                self._quarantine.switch_off("hung", f"a call did not return in {_MAX_CALL_S:.0f} s")
            elif num_waiting >= MAX_WAITING:
                self._quarantine.switch_off("too_slow", f"{num_waiting} reports wait for it")
        self._calls.put(call)
        if self._is_closed or not self._quarantine.is_active:
            self._drop_calls()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"quire-metrics-{self.name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while self._quarantine.is_active and (call := self._calls.get()) is not None:
            function, args, future = call
            self._began_at = time.monotonic()
            document = self._quarantine.call(function, *args)
            self._began_at = None
            if future is not None:
                future.set_result(document)
        self._drop_calls()

    def _drop_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._calls.get_nowait()
                if call is not None and call[2] is not None:
                    call[2].set_result(None)


def _render_checked(exporter: MetricsExporter) -> _Document:
    rendered: Any = exporter.render()
    if rendered is not None and not (len(rendered) == 2 and isinstance(rendered[1], bytes)):
        raise ValueError(f"render returned {rendered!r:.80}, not (content type, bytes)")
    return rendered  # type: ignore[no-any-return]
