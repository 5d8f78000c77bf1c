"""Quarantine: a plugin that the engine can do without is not called any more after a fault.

One class for every kind: policies, samplers, logits processors, proposers and metrics exporters. Who owns the plugin
says what takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from quire.core.stats import QuarantinedPlugin

__all__ = [
    "CANCELLATIONS",
    "NEVER_CONTAINED",
    "PluginInterrupt",
    "Quarantine",
    "QuarantineReason",
    "class_path",
    "read_error_text",
    "run_outside_of_plugin",
]

QuarantineReason = Literal["raised", "invalid_result", "too_slow", "no_progress", "hung"]
"""Why a plugin was quarantined: few words, since they label a metric. The log says what exactly happened."""

_log = logging.getLogger("quire.plugin")
_T = TypeVar("_T")
_MAX_ERROR_TEXT = 4000


class PluginInterrupt(BaseException):
    """Ends a call of a plugin that does not return. No ``Exception``, so that what the plugin catches lets it pass."""


NEVER_CONTAINED = (KeyboardInterrupt, PluginInterrupt)
"""What every handler around the code of a plugin passes on: the end that the user asks for, and the interrupt, which
may be meant for the call of another plugin around this one. All else that a plugin raises is its own, ``SystemExit``,
``CancelledError`` and the panics of Rust libraries included."""

CANCELLATIONS = (asyncio.CancelledError, GeneratorExit)
"""What is thrown into a coroutine that others end. Only where none can be, in calls that await nothing, are they what
the plugin itself raised."""


class Quarantine:
    """Guards the calls of one plugin. At its first fault one line is logged, and ``on_fault`` is given the record.

    The calls come from one thread at a time. ``quire.core.engine.watchdog`` finds in that thread's stack which call
    does not return, and interrupts it from a thread of its own.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        on_fault: Callable[[QuarantinedPlugin], None],
        *,
        replacement: str = "",
        outcome: str = "is quarantined",
        time_limit_s: float = math.inf,
        max_slow_calls: int = 3,
        hang_limit_s: float = math.inf,
        not_faults: tuple[type[BaseException], ...] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.kind = kind
        self.name = name
        self.is_active = True
        """Whether the plugin is still called."""
        self.hang_limit_s = hang_limit_s
        """A call that takes longer is interrupted; without a limit, the time limit of a step is one."""
        self.running_call = 0
        """The number of the call that is running; 0: none is."""
        self._num_calls = 0
        self._interrupt_lock = threading.Lock()
        self._interrupted_thread = 0  # the thread in which the running call is interrupted; 0: it is not
        self._on_fault = on_fault
        self._outcome = outcome
        self._consequence = f"; {replacement} takes over" if replacement else ""
        self._time_limit_s = time_limit_s
        self._max_slow_calls = max_slow_calls
        self._num_slow_calls: dict[str, int] = {}  # by function: those in a row, up to the last call
        self._not_faults = not_faults
        self._clock = clock

    def call(self, function: Callable[..., _T], *args: object) -> _T | None:
        """What ``function`` returns; None if it raises, or if the plugin is quarantined and is not called.

        Exceptions of the types ``not_faults`` are the engine's affair and are raised.
        """
        if not self.is_active:
            return None
        self._num_calls += 1
        try:
            try:
                self.running_call = self._num_calls
                return function(*args)
            except NEVER_CONTAINED:
                raise
            except self._not_faults:
                raise
            except BaseException as error:
                fault, text = error, read_error_text(error)  # within the call: it is code of the plugin as well
            finally:
                self.running_call = 0
                if self._interrupted_thread:
                    self._end_interrupt()
        except self._not_faults:
            raise
        except PluginInterrupt:
            self._end_interrupt()
            self.switch_off("hung", f"{_name_of(function)} did not return and was interrupted")
            return None
        self.switch_off("raised", f"{_name_of(function)} raised {type(fault).__name__}: {text}", fault)
        del fault  # whose traceback has this frame
        return None

    def call_timed(self, function: Callable[..., _T], *args: object) -> _T | None:
        """As ``call``. A function that takes longer than ``time_limit_s``, ``max_slow_calls`` times in a row, is a
        fault too, whatever other functions of the plugin take in between.

        Time is measured after the call: one that never returns is interrupted after ``hang_limit_s``.
        """
        start = self._clock()
        result = self.call(function, *args)
        seconds = (self._clock() - start) / 1e9
        if seconds <= self._time_limit_s:
            if self._num_slow_calls:
                self._num_slow_calls.pop(_name_of(function), None)
            return result
        name = _name_of(function)
        num_slow_calls = self._num_slow_calls[name] = self._num_slow_calls.get(name, 0) + 1
        if num_slow_calls < self._max_slow_calls:
            return result
        self.switch_off(
            "too_slow",
            f"{name} took {seconds * 1e3:.0f} ms, over {self._time_limit_s * 1e3:.0f}, {num_slow_calls} times in a row",
        )
        return None

    def interrupt_call(self, call: int, thread_id: int) -> bool:
        """From another thread: raise ``PluginInterrupt`` in the running call ``call``, which runs in ``thread_id``, as
        soon as that thread executes Python code. False, and nothing happens, if the call has ended or was interrupted
        before."""
        with self._interrupt_lock:
            # In this order: the call's end looks at the second after it has changed the first, so that either this
            # sees the end, or the end waits for the lock and takes the exception back.
            if self._interrupted_thread:
                return False  # once is enough: a second exception might be raised behind the call
            self._interrupted_thread = thread_id
            if self.running_call != call:
                self._interrupted_thread = 0
                return False
            _raise_in_thread(thread_id, PluginInterrupt)
            return True

    def switch_off(self, reason: QuarantineReason, detail: str, error: BaseException | None = None) -> None:
        """Quarantine the plugin for what its owner found out. Does nothing if it is quarantined already. An owner whose
        plugin runs in another thread may find something out while it does."""
        with self._interrupt_lock:
            was_active, self.is_active = self.is_active, False
        if not was_active:
            return
        line = f"{self.kind}/{self.name} {self._outcome} ({reason}): {detail}{self._consequence}"
        _log.error("%s", line, exc_info=error)
        self._on_fault(QuarantinedPlugin(self.kind, self.name, reason))

    def _end_interrupt(self) -> None:
        """Nothing is raised in this thread any more, once this has returned."""
        self.running_call = 0
        with self._interrupt_lock:
            thread_id, self._interrupted_thread = self._interrupted_thread, 0
        if thread_id:
            _absorb_interrupt(thread_id)


def read_error_text(error: BaseException) -> str:
    """What an exception says, on one line of bounded length; also of one that raises when it is asked."""
    try:
        return " ".join(str(error)[:_MAX_ERROR_TEXT].split())
    except NEVER_CONTAINED:
        raise
    except BaseException as fault:  # the exceptions of a plugin are code of the plugin
        return f"(its text cannot be read: {type(fault).__name__})"


def run_outside_of_plugin(function: Callable[..., _T], *args: object) -> _T:
    """What ``function`` returns. Called by a plugin whose own call is guarded, it takes none of the plugin's time."""
    return function(*args)


def _raise_in_thread(thread_id: int, exception: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(exception))


def _absorb_interrupt(thread_id: int) -> None:
    """Raise and catch, in the thread that calls this, the exception that waits for it, if one does.

    It is asked for once more, in the place of one that waits, so that one surely comes. One that is only taken back (a
    null pointer in its place) leaves the interpreter's signal set: every check for signals is slow from then on, and
    with Python 3.11 a traced function (coverage, a debugger) never begins, since its first instruction is tried again
    for as long as the signal is set.
    """
    with contextlib.suppress(PluginInterrupt):
        _raise_in_thread(thread_id, PluginInterrupt)
        while True:
            time.sleep(0)


def class_path(plugin: object) -> str:
    """The name of a plugin's class, or of one that was made from it: ``module:Class``, as on the command line."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{cls.__module__}:{cls.__qualname__}"


def _name_of(function: Callable[..., object]) -> str:
    """As its contract calls it: ``_apply_checked`` calls ``apply``."""
    name: str = getattr(function, "__name__", type(function).__name__)
    return name.lstrip("_").removesuffix("_checked")
