"""Notices what does not end: calls of plugins, which it interrupts, and steps, which it reports."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from quire.core.engine.ipc import EngineHung
from quire.core.plugin.frames import PluginFrames, find_plugin_calls, is_debugged

if TYPE_CHECKING:
    from quire.core.engine.engine_core import EngineCore
    from quire.core.plugin.quarantine import Quarantine

__all__ = ["PluginWatchdog", "StepWatchdog"]

_log = logging.getLogger("quire.engine")
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 0.02, 0.5
_LINGER_S = 1.0
"""How long the thread waits for another turn where no loop keeps it."""
_GRACE_S = 2.0
"""What an interrupted plugin, and the step around it, get to end."""


class StepWatchdog:
    """Looks from a thread of its own, twice a second, at the thread that steps an engine core.

    What is past its limit is found in the stacks of the threads, so that a step pays for little. A guarded plugin
    (``Quarantine``) is interrupted and quarantined; a step that does not end all the same is logged, with the plugin
    that it is in, and given to ``report_hang``. Time in which a worker compiles, the executor ends its workers, a
    debugger is attached, or this whole process is stopped, does not count.

    As a context manager it watches the block, for a loop that says when it is idle. Otherwise each step is put between
    ``begin_turn`` and ``end_turn``; the thread then ends soon after the last one, and keeps nothing alive.
    """

    def __init__(
        self,
        core: EngineCore,
        report_hang: Callable[[EngineHung], None] | None = None,
        on_tick: Callable[[bool], None] | None = None,
    ) -> None:
        self.num_turns = 0
        """To be increased between two steps: the sign that one has ended."""
        self.is_idle = False
        """Whether the thread waits for work, for as long as it likes."""
        self._core = core
        self._step_timeout_s = core.config.watchdog.step_timeout_s
        self._activity, self._limit_s = "a step", self._step_timeout_s
        self._report_hang = report_hang
        self._on_tick = on_tick
        self._frames = PluginFrames(core.config)
        self._calls = _CallTimes()
        self._turn, self._seconds, self._is_reported = -1, 0.0, False  # what was seen of the turn that runs
        self._thread_id = 0
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    def __enter__(self) -> StepWatchdog:
        self._thread_id = threading.get_ident()
        self._start_thread(math.inf)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def begin_turn(self) -> None:
        """What this thread does from now on is watched."""
        self._thread_id = threading.get_ident()
        self.num_turns += 1
        self.is_idle = False
        if self._thread is None:
            self._start_thread(_LINGER_S)

    def end_turn(self) -> None:
        """It is not, any more."""
        self.is_idle = True

    @contextlib.contextmanager
    def allow_time(self, activity: str, seconds: float) -> Iterator[None]:
        """What runs inside is no step, and may take ``seconds`` if that is more."""
        self._activity, self._limit_s = activity, max(seconds, self._step_timeout_s)
        self.num_turns += 1
        try:
            yield
        finally:
            self._activity, self._limit_s = "a step", self._step_timeout_s
            self.num_turns += 1

    def _start_thread(self, max_idle_s: float) -> None:
        self._thread = threading.Thread(target=self._watch, args=(max_idle_s,), name="quire-watchdog", daemon=True)
        self._thread.start()

    def _watch(self, max_idle_s: float) -> None:
        _stop_tracing()
        interval = min(_MAX_INTERVAL_S, max(self._step_timeout_s / 4, _MIN_INTERVAL_S))
        last, idle_s = time.monotonic(), 0.0
        while not self._end.wait(interval):
            now = time.monotonic()
            # Whoever stopped the process, or the machine, stopped this thread as well: that time is left out.
            elapsed, last = min(now - last, 2 * interval), now
            try:
                self._look(elapsed)
            except Exception as error:  # an executor's; while this thread lives, the API process hears of hangs
                _log.error("the watchdog failed", exc_info=error)
            idle_s = idle_s + elapsed if self.is_idle else 0.0
            if idle_s > max_idle_s:
                # In this order: ``begin_turn`` looks at the second after it has changed the first.
                self._thread = None
                if self.is_idle:
                    return
                self._thread, idle_s = threading.current_thread(), 0.0

    def _look(self, elapsed: float) -> None:
        is_compiling = self._core.executor.is_compiling
        if self._on_tick is not None:
            self._on_tick(is_compiling)
        if self.num_turns != self._turn or self.is_idle:
            self._turn, self._seconds, self._is_reported = self.num_turns, 0.0, False
            self._calls.clear()
            return
        if is_compiling or self._core.executor.is_ending or is_debugged(self._thread_id):
            return
        self._seconds += elapsed
        is_late = self._seconds >= self._limit_s
        # Of other engines in this process no call is touched that has not run for long itself.
        self._calls.interrupt_hung(elapsed, self._limit_s / 2 if is_late else self._limit_s)
        grace_s = _GRACE_S if self._calls.was_interrupted else 0.0
        if is_late and self._seconds >= self._limit_s + grace_s and not self._is_reported:
            self._is_reported = True
            self._report(self._seconds)

    def _report(self, seconds: float) -> None:
        stacks = self._frames.read_stacks(self._thread_id)
        plugins = [stack.plugin for stack in stacks if stack.plugin is not None]
        # An executor only waits for what another plugin does in a thread of its own.
        plugins.sort(key=lambda plugin: plugin[0] == "executor")
        report = EngineHung(self._activity, seconds, *(plugins[0] if plugins else (None, None)))
        text = "\n".join(f"thread {stack.thread_name}:\n{stack.text.rstrip()}" for stack in stacks)
        _log.error("%s\n%s", report.describe(), text)
        if self._report_hang is not None:
            self._report_hang(report)


class PluginWatchdog:
    """Interrupts guarded plugins that do not return in the thread that constructs it, an event loop's: nothing else
    happens in it meanwhile; and in the threads that ``list_thread_ids`` gives. ``stop`` ends the watch."""

    def __init__(self, limit_s: float = 5.0, list_thread_ids: Callable[[], Sequence[int]] = lambda: ()) -> None:
        self._limit_s, self._thread_id = limit_s, threading.get_ident()
        self._list_thread_ids = list_thread_ids
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="quire-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        _stop_tracing()
        calls, last = _CallTimes(), time.monotonic()
        while not self._end.wait(_MAX_INTERVAL_S):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * _MAX_INTERVAL_S), now
            calls.interrupt_hung(elapsed, self._limit_s, (self._thread_id, *self._list_thread_ids()))


class _CallTimes:
    """How long guarded calls of plugins have been running, as far as they were seen."""

    def __init__(self) -> None:
        self.was_interrupted = False
        self._seconds: dict[tuple[Quarantine, int], float] = {}

    def clear(self) -> None:
        """Every call that was seen has ended."""
        if self._seconds:
            self._seconds.clear()
        self.was_interrupted = False

    def interrupt_hung(self, elapsed: float, limit_s: float, only_threads: Sequence[int] | None = None) -> None:
        """Interrupt the calls, of all threads or some, that are past their own limit, or ``limit_s``."""
        seen: dict[tuple[Quarantine, int], float] = {}
        for quarantine, call, thread_id in find_plugin_calls():
            if only_threads is not None and thread_id not in only_threads:
                continue
            seconds = seen[quarantine, call] = self._seconds.get((quarantine, call), 0.0) + elapsed
            is_hung = seconds >= min(quarantine.hang_limit_s, limit_s)
            if is_hung and quarantine.interrupt_call(call, thread_id):
                self.was_interrupted = True
                _log.warning("%s/%s does not return: interrupting it", quarantine.kind, quarantine.name)
        self._seconds = seen


def _stop_tracing() -> None:
    """Leave this thread alone, for coverage and debuggers: with Python 3.11 no traced function begins, in any thread,
    while an interrupt waits for a plugin that is in C code."""
    sys.settrace(None)
