"""Quarantine: a plugin that the engine can do without is not called any more after a fault.

One class for every kind: policies, samplers, logits processors, proposers and metrics exporters. Who owns the plugin
says what takes its place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from time import monotonic_ns
from typing import Literal, TypeVar

from quire.core.stats import QuarantinedPlugin

__all__ = ["Quarantine", "QuarantineReason", "class_path"]

QuarantineReason = Literal["raised", "invalid_result", "too_slow", "no_progress"]
"""Why a plugin was quarantined: few words, since they label a metric. The log says what exactly happened."""

_log = logging.getLogger("quire.plugin")
_T = TypeVar("_T")


class Quarantine:
    """Guards the calls of one plugin. At its first fault one line is logged, and ``on_fault`` is given the record."""

    def __init__(
        self,
        kind: str,
        name: str,
        on_fault: Callable[[QuarantinedPlugin], None],
        *,
        replacement: str = "",
        time_limit_s: float = math.inf,
        max_slow_calls: int = 3,
        not_faults: tuple[type[Exception], ...] = (),
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.kind = kind
        self.name = name
        self.is_active = True
        """Whether the plugin is still called."""
        self._on_fault = on_fault
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
        try:
            return function(*args)
        except self._not_faults:
            raise
        except Exception as error:
            self.switch_off("raised", f"{_name_of(function)} raised {type(error).__name__}: {error}", error)
            return None

    def call_timed(self, function: Callable[..., _T], *args: object) -> _T | None:
        """As ``call``. A function that takes longer than ``time_limit_s``, ``max_slow_calls`` times in a row, is a
        fault too, whatever other functions of the plugin take in between.

        Time is measured after the call: a call that never returns cannot be ended.
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

    def switch_off(self, reason: QuarantineReason, detail: str, error: Exception | None = None) -> None:
        """Quarantine the plugin for what its owner found out. Does nothing if it is quarantined already."""
        if not self.is_active:
            return
        self.is_active = False
        line = f"{self.kind}/{self.name} is quarantined ({reason}): {detail}{self._consequence}"
        _log.error("%s", line, exc_info=error)
        self._on_fault(QuarantinedPlugin(self.kind, self.name, reason))


def class_path(plugin: object) -> str:
    """The name of a plugin that was made from its class: ``module:Class``, as on the command line."""
    return f"{type(plugin).__module__}:{type(plugin).__qualname__}"


def _name_of(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", type(function).__name__)
